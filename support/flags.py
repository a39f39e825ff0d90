"""Argument types shared by both scripts."""

import argparse
import glob
import math
import os
from pathlib import Path


def path(text):
    """Returns a `Path` in which a leading ~ is the home directory."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path.expanduser raises if there is no such user


def integer(lowest, highest):
    """Returns an argument type for integers in a range, both ends included."""

    def integer(text):
        if not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be between {lowest:,} and {highest:,}, not {text}")
        return int(text)

    return integer


def positive_number(text):
    """Argument type for finite numbers greater than 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
    return float(text)


def expand(paths):
    """Returns the paths, with patterns that the shell left unexpanded replaced by their matches.

    Raises FileNotFoundError if a pattern matches nothing.
    """
    expanded = []
    for path in paths:
        is_pattern = glob.has_magic(str(path)) and not path.exists()
        matches = sorted(path.parent.glob(path.name)) if is_pattern else [path]
        if not matches:
            raise FileNotFoundError(2, "No file matches this pattern", str(path))
        expanded += matches
    return expanded
