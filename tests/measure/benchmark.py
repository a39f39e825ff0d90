"""Speed and memory relative to baselines: the speed table of tests/measure/README.md.

    python tests/measure/benchmark.py          # all rows, about 25 minutes, nothing else running
    python tests/measure/benchmark.py 1 2 4    # these rows

Both sides of a ratio are measured in turn, after a first round that is not counted; a figure is the
median of the ratios of three rounds or more, so that a slow minute of the machine weighs on both sides.
Training runs on CUDA if it is available.
"""

import argparse
import contextlib
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import datafile  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
from support.augmentation import augment  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def rounds_of_seconds(*functions, rounds=3):
    """The times of the functions, called in turn, a tuple per round; the first round is left out."""
    return [tuple(map(timed, functions)) for _ in range(1 + rounds)][1:]


def median_ratio(ours, theirs, rounds=3):
    """The time of one function over that of another, the median of the rounds."""
    return statistics.median(one / other for one, other in rounds_of_seconds(ours, theirs, rounds=rounds))


def standard_dataset():
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return datasets.MNIST(datafile.DATA_DIR, transform=transform)


def read(batches):
    for _ in batches:
        pass


def bare_batches(x, y):
    permutation = torch.randperm(len(x))
    for i in range(0, len(x), 128):
        batch = permutation[i : i + 128]
        yield x[batch], y[batch]


def loader_against_standard():
    """1: images/s of the training loader over DataLoader with 2 workers on torchvision.datasets.MNIST"""
    standard = DataLoader(standard_dataset(), batch_size=128, shuffle=True, num_workers=2)
    loader = datafile.get_loaders()[0]
    ratio = median_ratio(lambda: read(standard), lambda: read(loader))
    return f"{ratio * len(loader.dataset) / len(standard.dataset):.0f}x"


def epoch_against_bare_loop():
    """2: time of an epoch of train.py over that of a bare loop of the same arithmetic"""
    loader = datafile.get_loaders(device=DEVICE)[0]
    model = models.Model_3().to(DEVICE)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

    def bare():
        model.train()
        averaged, values = map(train.floating_point_tensors, (average, model))
        for images, labels in bare_batches(*loader.dataset.tensors):
            loss = cross_entropy(model(augment(images, datafile.BACKGROUND)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            train.update_average(averaged, values, 0.01)
        loss.item()

    epoch = lambda: train.train_epoch(model, average, loader, optimizer, 1)  # noqa: E731
    return f"{median_ratio(epoch, bare, rounds=7):.3f}x"


def step_against_peak():
    """3: FLOP/s of Model_3's training step over those of a 2,048 x 2,048 float32 matrix product"""
    images, labels = next(iter(datafile.get_loaders(device=DEVICE)[0]))
    model = models.Model_3().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    matrix = torch.rand(2048, 2048, device=DEVICE)

    def step():
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    with FlopCounterMode(display=False) as counter:
        step()
    times = rounds_of_seconds(step, lambda: (matrix @ matrix)[0, 0].item(), rounds=50)
    step_time, product_time = map(statistics.median, zip(*times, strict=True))
    # Of the convolutions only: the products of P4MReadout are mostly with zeros.
    counts = counter.get_flop_counts()["Global"]
    flops = sum(count for kind, count in counts.items() if "convolution" in str(kind)) / step_time
    peak = 2 * 2048**3 / product_time
    return f"{flops / peak:.0%} of {peak / 1e9:.0f} GFLOP/s"


def python(*arguments, threads=None):
    """Runs Python with these arguments, in a folder that is then deleted."""
    with tempfile.TemporaryDirectory() as folder:
        assert start(*arguments, folder=folder, threads=threads).wait() == 0, arguments


def peak_memory(*arguments):
    """The bytes that Python took at most; asked by a small process, as a child inherits its parent's peak."""
    ask = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3); "
    ask += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    with tempfile.TemporaryDirectory() as folder:
        pipe = {"stdout": subprocess.PIPE}
        output, _ = start("-c", ask, sys.executable, *arguments, folder=folder, **pipe).communicate()
    return int(output) * (1 if sys.platform == "darwin" else 1024)


def start(*arguments, folder, threads=None, **options):
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, *map(str, arguments)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen(command, cwd=folder, env=environment, **options)


IMPORTS = "-c", "import torch, torchvision"


def start_against_imports():
    """4: time of `train.py --help` and time to the first training step, over `import torch, torchvision`"""
    to_first_step = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.train_epoch = lambda *arguments: os._exit(0)
train.main()
"""
    imports = lambda: python(*IMPORTS)  # noqa: E731
    usage = median_ratio(lambda: python(ROOT / "train.py", "--help"), imports, rounds=5)
    first_step = median_ratio(lambda: python("-c", to_first_step), imports, rounds=5)
    return f"{usage:.2f}x, {first_step:.2f}x"


def memory_against_imports():
    """5: peak memory of a run of Model_3 over that of `import torch, torchvision`"""
    run = peak_memory(ROOT / "train.py", "--epochs", 1)
    return f"+ {(run - peak_memory(*IMPORTS)) / 1e6:.0f} MB"


def seconds_to_99_percent(seed, optimizer="adam"):
    """The time from the start of `python train.py` until it has printed a validation accuracy of 99%."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pipe = {"stdout": subprocess.PIPE, "text": True}
        process = start(ROOT / "train.py", "--seed", seed, "--optimizer", optimizer, folder=folder, **pipe)
        for line in process.stdout:
            if line.startswith("Validation") and float(line.split()[-1][:-1]) >= 99:
                seconds = time.perf_counter() - started
                break
        process.kill()
        process.communicate()
    return seconds


def standard_seconds_to_99_percent():
    """The same of the net and the recipe of pytorch/examples `mnist`, on the standard pipeline."""
    started = time.perf_counter()
    torch.manual_seed(0)
    order = torch.randperm(60_000).tolist()
    dataset = standard_dataset()
    loader = DataLoader(Subset(dataset, order[5_000:]), batch_size=64, shuffle=True, num_workers=2)
    validation = DataLoader(Subset(dataset, order[:5_000]), batch_size=1_000, num_workers=2)
    convolutions = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    head = nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
    model = nn.Sequential(*convolutions, nn.Dropout(0.25), *head).to(DEVICE)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    accuracy = 0
    while accuracy < 0.99:
        model.train()
        for images, labels in loader:
            loss = cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.eval()
            hits = [(model(x.to(DEVICE)).argmax(1).cpu() == y).sum() for x, y in validation]
        accuracy = float(sum(hits)) / 5_000
    return time.perf_counter() - started


def time_to_99_percent():
    """6: time until 99% validation, Model_3, over that of pytorch/examples `mnist`; over fast_recipe.py's"""
    before = [seconds_to_99_percent(seed) for seed in range(3)]
    theirs = standard_seconds_to_99_percent()
    fast = statistics.median(timed(lambda: python(ROOT / "tests/measure/fast_recipe.py")) for _ in range(3))
    ours = statistics.median(before + [seconds_to_99_percent(seed) for seed in range(3)])
    return f"1/{theirs / ours:.1f}, {ours / fast:.2f}x: {ours:.1f} s, {theirs:.0f} s, {fast:.1f} s"


ONE_EPOCH = ROOT / "train.py", "--epochs", 1


def two_with_nothing_set():
    """7: each of two concurrent runs over a single run, with no settings in the environment"""

    def together():
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            runs = [start(*ONE_EPOCH, folder=folder) for folder in (one, two)]
            assert not any(run.wait() for run in runs)

    return f"{median_ratio(together, lambda: python(*ONE_EPOCH)):.2f}x"


def beside_a_busy_process():
    """8: a run beside a busy process over a single run"""

    def beside():
        with tempfile.TemporaryDirectory() as folder:
            busy = start("-c", "while True: pass", folder=folder)
            try:
                python(*ONE_EPOCH)
            finally:
                busy.kill()
                busy.wait()

    return f"{median_ratio(beside, lambda: python(*ONE_EPOCH)):.2f}x"


ROWS = [
    loader_against_standard,
    epoch_against_bare_loop,
    step_against_peak,
    start_against_imports,
    memory_against_imports,
    time_to_99_percent,
    two_with_nothing_set,
    beside_a_busy_process,
]


def cpu_name():
    """The name of the processor, if known."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = range(1, 1 + len(ROWS))
    parser.add_argument(
        "rows", nargs="*", type=int, metavar="ROW", help=f"{numbers[0]} to {numbers[-1]}, or all"
    )
    chosen = parser.parse_args().rows or numbers
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    print(f"{cpu_name()}, {os.cpu_count()} cores, {capability}, {threads} threads; {versions}, {DEVICE}")
    for row in chosen:
        print(f"{ROWS[row - 1].__doc__}: {ROWS[row - 1]()}", flush=True)


if __name__ == "__main__":
    main()
