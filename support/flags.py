"""What both scripts take from the command line, for `argparse`."""

import argparse

import torch


def device(text):
    """Returns the `torch.device` of this name, once a tensor on it has been made and read back."""
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # each kind of device that this build lacks fails in its own way
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"there is no device '{text}' here ({reason})") from error
    return torch.device(text)


def default_device():
    """Returns the accelerator that PyTorch finds (CUDA, MPS, ...), and the CPU where there is none."""
    return (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )


def check_ranges(parser, args, ranges):
    """Ends the program as `parser` does at a mistake where a flag's value is out of its range.

    Args:
        ranges: for the name of a flag, such as "batch_size", its lowest and its highest value; a flag
            that was not given, None, has no value to be checked.
    """
    for name, (lowest, highest) in ranges.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"argument {flag}: {value} is not from {lowest:,} to {highest:,}")
