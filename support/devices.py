"""Device selection, and CUDA graphs."""

import argparse
import os
import shutil

import torch

from support import distributed
from support.exits import RunError, warn


def parse_device(text):
    """Argument type for devices: returns a `torch.device` after creating a tensor on it.

    With torchrun, "cuda" is the process's own GPU. If there are more processes than GPUs, they take turns.
    """
    if text == "cuda" and distributed.WORLD_SIZE > 1 and torch.cuda.device_count():
        text = f"cuda:{distributed.LOCAL_RANK % torch.cuda.device_count()}"
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # unavailable devices raise many different exceptions
        reason = str(error).split("\n")[0]
        raise argparse.ArgumentTypeError(f"device {text!r} is not available: {reason}") from error
    return torch.device(text)


def select_device(chosen=None):
    """Returns `chosen`, or by default CUDA if a tensor can be created on it, else the CPU.

    Prints a line if there is an NVIDIA GPU that cannot be used.

    Raises:
        RunError: with torchrun, this process's GPU cannot be used; the others would wait for the CPU.
    """
    if chosen is None and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        try:
            chosen = parse_device("cuda")
        except argparse.ArgumentTypeError as error:
            if distributed.WORLD_SIZE > 1 and torch.cuda.device_count():
                raise RunError(str(error)) from error
            if shutil.which("nvidia-smi"):
                warn(f"Running on the CPU: {error}")
    chosen = chosen or torch.device("cpu")
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen


def capture(function, *batch):
    """Returns `function`, of tensors on CUDA, as a CUDA graph: one launch instead of one per kernel.

    The kernels of a training step are so small that launching them one by one takes about ten times as long
    as running them. Batches of another size than `batch` are passed to `function` itself. The function must
    not synchronize with the device, and must have been called before. The next call overwrites its results.
    """
    inputs = [tensor.clone() for tensor in batch]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)

    def replay(*batch):
        if len(batch[0]) != len(inputs[0]):
            return function(*batch)
        for tensor, value in zip(inputs, batch):
            tensor.copy_(value)
        graph.replay()
        return outputs

    return replay
