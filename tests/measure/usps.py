"""Scores trained files on USPS, digits from envelopes that no model here was trained on.

    python tests/measure/usps.py models/weights/*.pth

J. J. Hull, "A database for handwritten text recognition research", IEEE PAMI 16(5), 1994: 7,291 and 2,007
images of 16 x 16 pixels. They are only resized to 28 x 28 (bilinear). Downloads them to --data-dir (7 MB).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from torchvision import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
from support import checkpoint  # noqa: E402
from support.metrics import accuracy, predict  # noqa: E402


def read_usps(folder, train):
    """Returns a `DataLoader` over the training or the test part of USPS, as `datafile.make_loader` does."""
    usps = datasets.USPS(folder, train=train, download=True)
    images = torch.from_numpy(usps.data)[:, None].float()
    images = interpolate(images, (28, 28), mode="bilinear").round().byte()[:, 0]
    return datafile.make_loader(images, torch.tensor(usps.targets), "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path, default=Path("usps"))
    args = parser.parse_args()
    args.data_dir.mkdir(exist_ok=True)
    parts = [read_usps(args.data_dir, train) for train in (True, False)]
    print(f"{'':40}{'training part':>16}{'test part':>12}")
    for path in args.checkpoints:
        model = checkpoint.load(path)
        accuracies = [accuracy(*predict(model, part)) for part in parts]
        print("{!s:40}{:>16.2%}{:>12.2%}".format(path, *accuracies))


if __name__ == "__main__":
    main()
