"""Train a tiny MNIST classifier and report how good it is.

    python train.py                                  # Model_3, the advanced one
    python train.py --model Model_1 --seed 1
    python train.py --model all --output-dir runs

Read from top to bottom: the recipes, one epoch, the score, the files, the loop, the flags.
"""

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchsummary import summary
from tqdm import tqdm

import models
from datafile import DATA_DIR, augment, get_loaders


class Recipe(NamedTuple):
    """What differs from one model's training to another's."""

    epochs: int
    lr: float  # Adam's learning rate at the start


RECIPES = {
    "Model_1": Recipe(epochs=2, lr=0.01),
    "Model_2": Recipe(epochs=12, lr=0.005),
    "Model_3": Recipe(epochs=15, lr=0.01),
}
PLATEAU = 0.003  # the accuracy, a fraction, that an epoch must gain to count as progress


def train_epoch(model, average, loader, optimizer, epoch):
    """Takes one optimiser step a batch, the average of the weights following each.

    Returns:
        The mean loss of the epoch and its accuracy (a fraction), on the images as the model saw
        them: augmented, with dropout, and by weights that were still changing.
    """
    model.train()
    # The sums stay on the device: to read one is to wait for everything queued before it.
    loss_sum, correct, seen = 0.0, 0, 0
    with tqdm(loader, f"Epoch {epoch}", leave=False, disable=None) as bar:  # None: not without a terminal
        for step, (images, labels) in enumerate(bar, (epoch - 1) * len(loader)):
            logits = model(augment(images))
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_average(average, model, 9 / (10 + step))  # so that it spans the last ninth of the steps

            loss_sum += loss.detach() * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            if not bar.disable and step % 20 == 0:
                bar.set_postfix_str(f"loss {loss_sum / seen:.3f}, {correct / seen:.2%}", refresh=False)
    return float(loss_sum / seen), float(correct / seen)


@torch.no_grad()
def update_average(average, model, weight):
    """Moves `average`, a copy of `model`, towards it by this weight, batch normalisation included.

    The average of the weights that a run passes through is often better than the last of them: B. Polyak,
    A. Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim.
    30(4), 1992. (`torch.optim.swa_utils.AveragedModel` reads its counter, and so waits, at each call.)
    """
    for averaged, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if value.is_floating_point():
            averaged.lerp_(value, weight)


@torch.no_grad()
def evaluate(model, loader):
    """Returns the accuracy of the model in evaluation mode, a fraction."""
    model.eval()
    correct = sum((model(images).argmax(1) == labels).sum() for images, labels in loader)
    return float(correct / len(loader.dataset))


def save(state, path):
    """Writes what `torch.load` reads back; a run killed meanwhile leaves the old file intact.

    Raises OSError where the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]})") from error
    finally:
        temporary.unlink(missing_ok=True)


def train(name, args):
    """Trains the model of this name, saves its weights after the best epoch and prints what they score.

    The validation images choose the epoch, lower the learning rate and stop the training. The test
    images are looked at once, when all that is decided.

    Returns:
        The saved weights' accuracies on the validation and on the test images, fractions.
    """
    started = time.perf_counter()
    epochs, lr = args.epochs or RECIPES[name].epochs, args.lr or RECIPES[name].lr
    path = args.output_dir / f"best_{name}.pth"
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: move it away, the best model is saved under this name")

    loaders = get_loaders(args.batch_size, seed=args.seed, device=args.device, data_dir=args.data_dir)
    train_loader, validation_loader, test_loader = loaders
    torch.manual_seed(args.seed)
    model = getattr(models, name)()
    print(f"{name} on {args.device}, seed {args.seed}")
    summary(copy.deepcopy(model).eval(), (1, 28, 28), device="cpu")
    sizes = [f"{len(loader.dataset):,}" for loader in loaders]
    print("Images: {} for training, {} for validation, {} for the test\n".format(*sizes))

    model.to(args.device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    scheduler = ReduceLROnPlateau(
        optimizer, mode="max", factor=0.1, patience=3, threshold=PLATEAU, threshold_mode="abs"
    )

    best_accuracy, best_epoch = -1.0, 0
    for epoch in range(1, epochs + 1):
        loss, training_accuracy = train_epoch(model, average, train_loader, optimizer, epoch)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} in epoch {epoch}: try a lower rate than {lr:g}")
        accuracy = evaluate(average, validation_loader)
        print(f"Epoch: {epoch}/{epochs}")
        print(f"Training Loss: {loss:.3f}")
        print(f"Training Accuracy: {training_accuracy:.2%}")
        print(f"Validation Accuracy: {accuracy:.2%}")
        print("-" * 50)

        if accuracy > best_accuracy:
            best_accuracy, best_epoch = accuracy, epoch
            save({key: value.cpu() for key, value in average.state_dict().items()}, path)
        elif args.early_stopping and epoch - best_epoch >= args.early_stopping:
            print(f"Stopped early: no better epoch in the last {args.early_stopping}")
            break
        scheduler.step(accuracy)
        if optimizer.param_groups[0]["lr"] < lr:
            lr = optimizer.param_groups[0]["lr"]
            print(f"Learning rate lowered to {lr:g}")

    average.load_state_dict(torch.load(path, weights_only=True))
    test_accuracy = evaluate(average, test_loader)
    print(f"Test Accuracy: {test_accuracy:.2%} (epoch {best_epoch}, {path.name})")
    print(f"Time: {time.perf_counter() - started:.0f} s")
    return best_accuracy, test_accuracy


def positive_int(text):
    """A flag's value: a whole number from 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def learning_rate(text):
    """A flag's value: a finite number over 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive, finite number")
    return value


def seed(text):
    """A flag's value: a whole number from 0 that fits in 63 bits."""
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**63 - 1")
    return value


def device(text):
    """A flag's value: the `torch.device` of this name, tried out."""
    try:
        torch.zeros(1, device=text).item()  # fails where there is no such device, or it holds no data
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"there is no device '{text}' here ({reason})") from error
    return torch.device(text)


def default_device():
    """The fastest kind of device that is there."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if torch.cuda.is_available() else mps


def parse_args(arguments=None):
    """Parses these arguments, or the command line's; prints usage and exits with status 2 on a mistake."""

    def per_model(field):
        return ", ".join(f"{name} {getattr(recipe, field):g}" for name, recipe in RECIPES.items())

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=[*RECIPES, "all"], default="Model_3", help="default: %(default)s")
    add("--epochs", type=positive_int, metavar="N", help=f"default: {per_model('epochs')}")
    add("--batch-size", type=positive_int, default=128, metavar="N", help="default: %(default)s")
    add("--lr", type=learning_rate, metavar="RATE", help=f"Adam's at the start; default: {per_model('lr')}")
    add("--seed", type=seed, default=0, metavar="N", help="of split, weights, order; default: %(default)s")
    add("--device", type=device, default=default_device(), help="default: cuda, else mps, else cpu")
    add("--early-stopping", type=positive_int, metavar="N", help="stop N epochs after the best; default: off")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="has MNIST/raw; default: %(default)s")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="for the models; default: this one")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # whoever follows a log sees each line at once
    names = list(RECIPES) if args.model == "all" else [args.model]
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):  # better found out now than after an epoch
            pass
        for name in names:
            train(name, args)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
