"""Device selection, and CUDA graphs."""

import argparse
import os
import shutil
from pathlib import Path

import torch

from support import distributed, process


def parse_device(text):
    """Argument type for devices: returns a `torch.device` after creating a tensor on it."""
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # unavailable devices raise many different exceptions
        is_unknown = "at start of device string" in str(error)  # followed by the names of twenty devices
        reason = "use cpu, cuda, cuda:1, mps, ..." if is_unknown else str(error).strip().split("\n")[0]
        raise argparse.ArgumentTypeError(f"device {text!r} is not available: {reason}") from error
    return torch.device(text)


def select_device(chosen=None):
    """Returns `chosen`, or by default CUDA if a tensor can be created on it, else the CPU.

    Prints a line if there is an NVIDIA GPU that cannot be used. With torchrun, each process gets its own GPU.
    """
    if chosen is None and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        try:
            chosen = parse_device("cuda")
        except argparse.ArgumentTypeError as error:
            files = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/usr/lib/wsl/lib").glob("libcuda.so*")]
            if files or shutil.which("nvidia-smi"):
                process.warn(f"Running on the CPU: {error}")
    chosen = chosen or torch.device("cpu")
    if chosen == torch.device("cuda") and distributed.WORLD_SIZE > 1:
        chosen = torch.device("cuda", distributed.LOCAL_RANK % torch.cuda.device_count())
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
