import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import datafile

ROOT = Path(__file__).resolve().parent.parent


def write_idx(path, array):
    header = struct.pack(f">{1 + array.dim()}I", 0x0800 + array.dim(), *array.shape)
    path.write_bytes(header + array.numpy().tobytes())


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder with the first 6,000 training images and the first 1,000 test images of MNIST."""
    folder = tmp_path_factory.mktemp("data")
    raw_dir = folder / "MNIST" / "raw"
    raw_dir.mkdir(parents=True)
    for prefix, n in ("train", 6_000), ("t10k", 1_000):
        images, labels = datafile.read_split(datafile.DATA_DIR / "MNIST" / "raw", prefix)
        write_idx(raw_dir / f"{prefix}-images-idx3-ubyte", images[:n])
        write_idx(raw_dir / f"{prefix}-labels-idx1-ubyte", labels[:n].to(torch.uint8))
    return folder


@pytest.fixture
def run(tmp_path):
    """Calls a script of this project as a user would, in an empty folder; returns the finished process."""

    def run(script, *arguments, check=True, env=None):
        command = [sys.executable, ROOT / script, *map(str, arguments)]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert not check or process.returncode == 0, process.stderr
        return process

    return run
