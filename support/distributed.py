"""The processes that torchrun starts; runs are distributed over them. RANK etc. are as in torchrun."""

import contextlib
import datetime
import os
import sys
from pathlib import Path

import torch.distributed as dist

from support.exits import RunError

LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()  # else the variables are stale
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0


@contextlib.contextmanager
def process_group():
    """Joins the processes, if there are several, until the block ends. Only rank 0 prints."""
    if WORLD_SIZE == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null if RANK else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


def all_gather(value):
    """Waits for all processes and returns their values, by rank. Raises RunError if one has stopped."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise RunError("another process of torchrun has stopped: see its message") from error
    return values


def barrier():
    """Waits for all processes. Raises RunError if one has stopped."""
    all_gather(None)
