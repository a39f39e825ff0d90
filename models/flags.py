"""Kinds of flag values, for `argparse`: each turns a text into a value, or says what is wrong with it."""

import argparse
import math

import torch


def number(kind, lowest, highest=math.inf):
    """Returns a flag's type: an int or a float (the kind), finite and from `lowest` to `highest`."""

    def parse(text):
        value = kind(text)
        if not lowest <= value <= highest or value == math.inf:
            until = "" if highest == math.inf else f" to {highest}"
            raise argparse.ArgumentTypeError(f"{text} is not a number from {lowest}{until}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # for argparse's own message
    return parse


def device(text):
    """A flag's value: the `torch.device` of this name, tried out."""
    try:
        torch.zeros(1, device=text).item()  # fails where there is no such device, or it holds no data
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"there is no device '{text}' here ({reason})") from error
    return torch.device(text)


def default_device():
    """The fastest kind of device that is there."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if torch.cuda.is_available() else mps
