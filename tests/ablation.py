"""What one ingredient of Model_3's recipe is worth: trains without it, on all of MNIST.

    python tests/ablation.py pose               # seeds 0 to 4, about two minutes each
    python tests/ablation.py nothing 0 1 2      # the recipe as it is, seeds 0 to 2

Prints the validation and test accuracies of each seed, then their mean and standard deviation.
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models  # noqa: E402
import train  # noqa: E402
from models import model_3  # noqa: E402
from models.model_2 import Upright  # noqa: E402


class Background(nn.Module):
    """What is left of `Upright` without its pose: the background at 0."""

    def forward(self, images):
        return images - Upright.BACKGROUND


def plain_filters():
    """Model_3 with ordinary convolutions, as wide as its number of parameters allows."""
    layers = [Upright()]
    for inputs, outputs, size, stride in (1, 8, 5, 2), (8, 12, 3, 1), (12, 12, 3, 1), (12, 12, 3, 1):
        layers += [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(-3, nn.MaxPool2d(2))
    layers += [nn.Conv2d(12, 12, 7, groups=12), nn.Flatten(), nn.LayerNorm(12), nn.ReLU()]
    layers += [nn.Dropout(0.1), nn.Linear(12, 10)]
    return nn.Sequential(*layers)


def nothing():
    """Leaves the recipe as it is."""


def pose():
    model_3.Upright = Background


def symmetry():
    models.Model_3 = plain_filters


def augmentation():
    train.augment = lambda images: images


def averaging():
    average = train.update_average
    train.update_average = lambda averaged, model, weight: average(averaged, model, 1.0)


def dropout():
    model_3.nn.Dropout = nn.Identity


def plateau():
    scheduler = train.ReduceLROnPlateau
    train.ReduceLROnPlateau = lambda optimizer, **options: scheduler(optimizer, **options | {"patience": 99})


VARIANTS = {f.__name__: f for f in (nothing, pose, symmetry, augmentation, averaging, dropout, plateau)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("without", choices=VARIANTS, help="the ingredient to leave out")
    parser.add_argument("seeds", type=int, nargs="*", default=range(5), help="default: 0 1 2 3 4")
    options = parser.parse_args()
    VARIANTS[options.without]()
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            arguments = train.parse_args(["--seed", str(seed), "--output-dir", folder])
            with contextlib.redirect_stdout(io.StringIO()):
                scores.append(train.train("Model_3", arguments))
            validation, test = scores[-1]
            print(f"without {options.without}, seed {seed}: {validation:.2%} validation, {test:.2%} test")
    for name, values in zip(("validation", "test"), zip(*scores, strict=True), strict=True):
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        print(f"{name}: {statistics.mean(values):.2%} +- {spread:.2%}, minimum {min(values):.2%}")


if __name__ == "__main__":
    main()
