"""How fast batches come: this project's loader against the usual one and against a bare loop.

    python tests/benchmark.py

Each figure is the median of three epochs over the 55,000 or 60,000 training images, on the CPU.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datafile  # noqa: E402


def images_per_second(epoch):
    """Runs `epoch`, a function that returns an iterable of batches, four times; the first is not counted."""
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        images = sum(len(labels) for _, labels in epoch())
        rates.append(images / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def main():
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    mnist = datasets.MNIST(datafile.DATA_DIR, transform=transform)
    usual = DataLoader(mnist, batch_size=128, shuffle=True, num_workers=2)
    ours = datafile.get_loaders()[0]
    x, y = ours.dataset.tensors

    def bare():
        permutation = torch.randperm(len(x))
        for i in range(0, len(x), 128):
            batch = permutation[i : i + 128]
            yield x[batch], y[batch]

    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {os.cpu_count()} CPU cores")
    usual, ours, bare = (images_per_second(epoch) for epoch in (lambda: usual, lambda: ours, bare))
    print(f"train_loader: {ours:,.0f} images/s")
    print(f"against DataLoader with 2 workers over torchvision.datasets.MNIST: {ours / usual:.0f} x")
    print(f"against a bare loop over the tensor: {ours / bare:.2f} x")


if __name__ == "__main__":
    main()
