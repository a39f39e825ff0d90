"""The fastest public recipe for about 99% on MNIST, in its plainest form.

It is the baseline of row 6 of tests/measure/benchmark.py.

    python tests/measure/fast_recipe.py

One epoch over 60,000 images that are one tensor, Adam, OneCycleLR and 215,194 parameters, after
https://github.com/tuomaso/train_mnist_fast.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402


def load(train, device):
    data = datasets.MNIST(datafile.DATA_DIR, train=train)
    return data.data[:, None].to(device).float().div_(255).sub_(0.1307).div_(0.3081), data.targets.to(device)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load(True, device)
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10)),
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.7, 0.9))
    batches = torch.randperm(len(images), device=device).split(256)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=len(batches))
    for batch in batches:
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    images, labels = load(False, device)
    with torch.no_grad():
        print(f"Test Accuracy: {(model(images).argmax(1) == labels).float().mean():.2%}")


if __name__ == "__main__":
    main()
