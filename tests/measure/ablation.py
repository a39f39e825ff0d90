"""Ablations: trains a model with and without one ingredient, from the same seeds, and prints the differences.

    python tests/measure/ablation.py averaging --seeds 0 1 2 3 4 5
    python tests/measure/ablation.py warm_up --seeds 0 1 2 3 4 --model Model_1

50,000 of the training images are trained on, 5,000 validate, and the other 5,000 ("judge") and USPS (see
`usps.py`) are what decisions are based on. Printed are means of the differences ± their standard errors, in
percentage points: below two standard errors, no gain is shown. A run of Model_3 takes minutes.
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from usps import read_usps  # noqa: E402

import datafile  # noqa: E402
import train  # noqa: E402
from models import MODELS, model_3  # noqa: E402
from models.layers import Deskew  # noqa: E402
from support.metrics import accuracy, predict  # noqa: E402


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


class WarmUp(torch.optim.Adam):
    """Adam whose learning rate rises linearly over its first 100 steps."""

    steps = 0

    def step(self):
        self.steps += 1
        (group,) = self.param_groups
        lr = group["lr"]
        group["lr"] = lr * min(1, self.steps / 100)
        super().step()
        group["lr"] = lr


def copy_weights(average, current, fraction):
    torch._foreach_copy_(average, current)


VARIANTS = {  # what is left out, or added: patches of a module or a dict
    "averaging": lambda: mock.patch.object(train, "update_average", copy_weights),
    "deskewing": lambda: mock.patch.object(model_3, "Deskew", Paper),
    "symmetry": lambda: mock.patch.dict(MODELS, Model_3=plain_filters),
    "plateau": lambda: mock.patch.dict(train.PLATEAU, patience=1_000),
    "tolerance": lambda: mock.patch("support.checkpoint.TOLERANCE", 0),
    "augmentation": contextlib.nullcontext,  # and --no-augment
    "warm_up": lambda: mock.patch.dict(train.OPTIMIZERS, adam=(WarmUp, 1)),
}


def hold_out_10000(labels, fold):
    """Replaces `datafile.split`; the second half of the validation set is the judge."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return order[:50_000], order[50_000:]


def run(model, seed, usps, augment=True):
    """Trains a model; returns its accuracies in percent: validation, judge, test and USPS's training part."""
    args = train.parse_args(["--model", model, "--device", "cpu", "--augment" if augment else "--no-augment"])
    with mock.patch.object(datafile, "split", hold_out_10000):
        loaders = datafile.get_loaders(seed=seed, upstrokes=augment)
    images, labels = loaders.validation.dataset.tensors
    batches = [slice(i, i + 1_000) for i in range(0, 5_000, 1_000)]

    def load(half):
        dataset = torch.utils.data.TensorDataset(images[half], labels[half])
        return torch.utils.data.DataLoader(dataset, sampler=batches, batch_size=None)

    judge = load(slice(5_000))
    validation = load(slice(5_000, None))
    loaders = loaders._replace(validation=validation)
    state = train.create_training_state(model, args, seed, None, loaders)
    for _ in range(train.RECIPES[model].epochs):
        train.run_epoch(state, loaders, augment)
    state.average_model.load_state_dict(state.best)
    parts = validation, judge, loaders.test, usps
    return [100 * accuracy(*predict(state.average_model, part)) for part in parts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ingredient", choices=VARIANTS, help="what to leave out, or, for warm_up, to add")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--model", choices=MODELS, default="Model_3")
    parser.add_argument("--usps", type=Path, default=Path("usps"), help="directory of USPS")
    args = parser.parse_args()
    args.usps.mkdir(exist_ok=True)
    usps = read_usps(args.usps, train=True)
    differences = []
    for seed in args.seeds:
        with_it = run(args.model, seed, usps)
        with VARIANTS[args.ingredient]():
            without = run(args.model, seed, usps, augment=args.ingredient != "augmentation")
        changes = [after - before for before, after in zip(with_it, without)]
        differences.append([*changes, (changes[0] + changes[1]) / 2])
        print(seed, *(f"{value:+.2f}" for value in differences[-1]), flush=True)
    parts = "validation", "judge", "test", "USPS", "validation and judge"
    for part, values in zip(parts, zip(*differences)):
        error = statistics.stdev(values) / len(values) ** 0.5
        print(f"{part:21}{statistics.mean(values):+.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
