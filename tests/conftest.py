import contextlib
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import datafile
import evaluate
import train
from support import checkpoint

torch.set_num_threads(1)  # reproducible on any machine
torch.backends.cudnn.allow_tf32 = False  # on CUDA, as exact as on the CPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "models" / "weights"
RAW_DIR = datafile.DATA_DIR / "MNIST" / "raw"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
BLOCK = re.compile(
    r"^Epoch: (\d+)/(\d+)\n"
    r"Training Loss: (\d+\.\d{3})\n"
    r"Training Accuracy: (\d+\.\d{2})%\n"
    r"Validation Accuracy: (\d+\.\d{2})%\n"
    r"-{50}\n",
    re.MULTILINE,
)
TEST_LINE = re.compile(
    r"^Test Accuracy: (\d+\.\d{2})% \(epoch (\d+), (best_\w+\.pth)\)\nTime: \d+ s(?: since resuming)?\n",
    re.MULTILINE,
)


def write_idx(path, array):
    header = struct.pack(f">{1 + array.dim()}I", 0x0800 + array.dim(), *array.shape)
    path.write_bytes(header + array.numpy().tobytes())


def same(one, other):
    """Returns True if two nested containers are equal, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def fingerprints(images):
    """Returns one integer per image; different images have different ones."""
    pixels = (images * datafile.STD + datafile.MEAN).mul(255).round().to(torch.int64).flatten(1)
    weights = torch.randint(2**40, (784,), generator=torch.Generator().manual_seed(0))
    return (pixels * weights).sum(1)


def seven(size=200, ink=0, paper=255, mode="L"):
    """A 7 of two strokes."""
    image = Image.new("L", (size, size), paper)
    thickness = max(1, size // 15)
    pixels = image.load()
    for step in range(size // 2):
        for offset in range(thickness):
            pixels[size // 4 + step, size // 4 + offset] = ink
            pixels[size * 3 // 4 - step // 2 - offset, size // 4 + step] = ink
    return image.convert(mode)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder with the first 1,200 training images and the first 1,000 test images of MNIST."""
    folder = tmp_path_factory.mktemp("data")
    raw_dir = folder / "MNIST" / "raw"
    raw_dir.mkdir(parents=True)
    for prefix, n in ("train", 1_200), ("t10k", 1_000):
        images, labels = datafile.read_split(RAW_DIR, prefix)
        write_idx(raw_dir / f"{prefix}-images-idx3-ubyte", images[:n])
        write_idx(raw_dir / f"{prefix}-labels-idx1-ubyte", labels[:n].to(torch.uint8))
    return folder


@pytest.fixture(scope="session")
def mnist():
    """The loaders over all of MNIST."""
    return datafile.get_loaders()


@pytest.fixture
def run(tmp_path):
    """Runs a script of this project as a user would, in an empty directory; returns the finished process."""

    def run(script, *arguments, check=True, **options):
        command = [sys.executable, ROOT / script, *map(str, arguments)]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": ONE_THREAD} | options
        process = subprocess.run(command, **options)
        assert not check or process.returncode == 0, process.stderr
        return process

    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls a script's main() in this process, in an empty directory; returns its output and status."""

    def call(script, *arguments, check=True):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            {"train.py": train, "evaluate.py": evaluate}[script].main()
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        errors = printed.err + (f"{code}\n" if isinstance(code, str) else "")
        status = 1 if isinstance(code, str) else code or 0
        assert not check or status == 0, errors
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=errors)

    return call


@pytest.fixture
def fit(call, small_data, tmp_path):
    """Trains on the small data, on the CPU, with train.py's main() in this process."""

    def fit(*arguments, **options):
        return call("train.py", "--data-dir", small_data, "--device", "cpu", *arguments, **options)

    return fit


@pytest.fixture
def start(tmp_path, tmp_path_factory, small_data):
    """Starts train.py on the small data with these arguments, its output going to files."""
    logs = tmp_path_factory.mktemp("logs")
    processes = []

    def start(*arguments, before=(), data_dir=small_data, **options):
        command = [*(before or [sys.executable]), ROOT / "train.py", "--data-dir", data_dir]
        paths = [logs / f"{len(processes)}.{stream}" for stream in ("out", "err")]
        with paths[0].open("w") as out, paths[1].open("w") as err:
            options = {"cwd": tmp_path, "env": ONE_THREAD, "stdout": out, "stderr": err} | options
            process = subprocess.Popen([*command, "--device", "cpu", *map(str, arguments)], **options)
        process.printed = lambda: tuple(path.read_text() for path in paths)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def end(process):
    """Waits for a process of `start`; returns its standard output and standard error."""
    process.wait(timeout=300)
    return process.printed()


def wait_for(process, text):
    """Waits until a process of `start` has begun a line with this."""
    while f"\n{text}" not in "\n" + process.printed()[0]:
        assert process.poll() is None, process.printed()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)


def best_weights(folder):
    """The weights in the files best_....pth of a folder."""
    return {name: state for name, state in saved_states(folder).items() if name.startswith("best")}


def saved_states(folder):
    """Reads every checkpoint in the folder that has its final name, each of which must be whole."""
    return {path.name: checkpoint.read(path) for path in sorted(folder.glob("[!.]*.pth"))}
