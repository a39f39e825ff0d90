"""Ablations: train.py without one ingredient of Model_3's recipe.

    python tests/measure/ablation.py deskewing --runs 3 --output-dir without_deskewing
    torchrun --nproc-per-node=2 tests/measure/ablation.py symmetry --runs 3 --output-dir without_symmetry

The first argument is the ingredient to leave out; the others are train.py's.
"""

import argparse
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
from models import model_3  # noqa: E402
from models.layers import Deskew  # noqa: E402


class Paper(nn.Module):
    """Replaces `Deskew`: only moves the background to 0."""

    def forward(self, images):
        return images + datafile.MEAN / datafile.STD


def plain_filters():
    """Model_3 with ordinary convolutions, as wide as its number of parameters allows."""
    layers = [Deskew()]
    for inputs, outputs, size in (1, 8, 5), (8, 8, 3), (8, 11, 3), (11, 11, 3), (11, 11, 3):
        layers += [nn.Conv2d(inputs, outputs, size, 2 if size == 5 else 1, size // 2, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.Hardswish()]
    layers.insert(5, nn.MaxPool2d(2))
    layers += [nn.Conv2d(11, 11, 7, groups=11, bias=False), nn.Flatten()]
    layers += [nn.LayerNorm(11, elementwise_affine=False), nn.Hardswish(), nn.Dropout(0.1), nn.Linear(11, 10)]
    return nn.Sequential(*layers)


def deskewing():
    model_3.Deskew = Paper


def symmetry():
    models.MODELS["Model_3"] = plain_filters


def averaging():
    average = train.update_average
    train.update_average = lambda averaged, values, weight: average(averaged, values, 1.0)


VARIANTS = {function.__name__: function for function in (deskewing, symmetry, averaging)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other flags are train.py's.")
    parser.add_argument("ingredient", choices=VARIANTS, help="what to leave out")
    args, sys.argv[1:] = parser.parse_known_args()
    VARIANTS[args.ingredient]()
    train.main()
