"""The workers started by torchrun, over which runs are distributed."""

import contextlib
import datetime
import os
import sys
from pathlib import Path

from torch import distributed

from support.process import RunError

RANK, WORLD_SIZE, LOCAL_RANK = 0, 1, 0
if distributed.is_available() and distributed.is_torchelastic_launched():  # else the variables are stale
    RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@contextlib.contextmanager
def process_group():
    """Joins the workers, if there are several, until the end of the run. Only rank 0 prints."""
    if WORLD_SIZE == 1:
        yield
        return
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null if RANK else sys.stdout):
            yield
    finally:
        distributed.destroy_process_group()


def gather(value=None):
    """Waits for all workers and returns their values, by rank. Raises RunError if one has stopped."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise RunError("another worker has stopped; add --resume to the same command") from error
    return values
