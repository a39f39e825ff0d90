"""Argument types, and flags as they are typed."""

import argparse
import os
from pathlib import Path


def path_type(text):
    """Argument type for paths: returns a `Path` in which a leading ~ is the home directory."""
    if not text:  # a shell variable that is not set, which would be the working directory
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises if there is no such user


def int_between(lowest, highest):
    """Returns an argument type for integers in a range, both ends included."""

    def integer(text):
        if not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be between {lowest:,} and {highest:,}, not {text}")
        return int(text)

    return integer


def positive_number(text):
    """Argument type for numbers greater than 0 and at most 1e30, which float32 can multiply."""
    if not 0 < float(text) <= 1e30:
        raise argparse.ArgumentTypeError(f"must be greater than 0 and at most 1e30, not {text}")
    return float(text)


def format_flag(flag, value):
    """Returns a flag and its value as one types them: ("lr", 0.01) is "--lr 0.01"."""
    flag = flag.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"
