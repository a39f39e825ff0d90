"""Train a tiny MNIST classifier and report how good it is.

    python train.py                                  # Model_3, the advanced one
    python train.py --model Model_1 --seed 1
    python train.py --model all --output-dir runs
    python train.py --resume                         # go on where an interrupted run was

Read from top to bottom: the recipes, one epoch, the score, the loop, the interruptions, the flags.
"""

import argparse
import contextlib
import copy
import math
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before the imports that take a second: Ctrl-C there ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchsummary import summary
from tqdm import tqdm

import models
from datafile import DATA_DIR, augment, get_loaders
from models import checkpoint


class Recipe(NamedTuple):
    """What differs from one model's training to another's."""

    epochs: int
    lr: float  # Adam's learning rate at the start


RECIPES = {
    "Model_1": Recipe(epochs=2, lr=0.01),
    "Model_2": Recipe(epochs=12, lr=0.005),
    "Model_3": Recipe(epochs=15, lr=0.01),
}


def train_epoch(model, average, loader, optimizer, epoch):
    """Takes one optimiser step a batch, the average of the weights following each.

    Returns:
        The mean loss of the epoch and its accuracy (a fraction), on the images as the model saw
        them: augmented, with dropout, and by weights that were still changing.

    Raises:
        FloatingPointError: a step's loss is not finite.
    """
    model.train()
    # A line of sums for each step. The device fills it in when it gets there and nothing waits for it.
    on_cuda = next(model.parameters()).is_cuda
    sums = torch.zeros(len(loader), 2, pin_memory=on_cuda)
    loss_sums, correct = sums.numpy().T
    seen = 0
    with tqdm(loader, f"Epoch {epoch}", leave=False, disable=None) as bar:  # None: not without a terminal
        for step, (images, labels) in enumerate(bar):
            logits = model(augment(images))
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps_before = (epoch - 1) * len(loader) + step
            update_average(average, model, 9 / (10 + steps_before))  # so that it spans the last ninth of all

            hits = (logits.argmax(1) == labels).sum()
            sums[step].copy_(torch.stack([loss.detach() * len(labels), hits]), non_blocking=True)
            seen += len(labels)
            if not math.isfinite(loss_sums.sum()):
                break
            bar.set_postfix_str(
                f"loss {loss_sums.sum() / seen:.3f}, {correct.sum() / seen:.2%}", refresh=False
            )
    loss.item()  # waits for the last of the sums
    for step, value in enumerate(loss_sums):
        if not math.isfinite(value):
            lr = optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss became {value} in epoch {epoch}, step {step + 1}, at a learning rate of {lr:g}: "
                "try a lower one (--lr)"
            )
    return float(loss_sums.sum() / seen), float(correct.sum() / seen)


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


def state_after_a_step(optimizer):
    """Returns the `state_dict` of a copy of the optimiser that has taken its first step."""
    optimizer = copy.deepcopy(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def train(name, args):
    """Trains the model of this name, saves its weights after the best epoch and prints what they score.

    The validation images choose the epoch, lower the learning rate and stop the training. The test
    images are looked at once, when all that is decided.

    Returns:
        The saved weights' accuracies on the validation and on the test images, fractions.
    """
    started = time.perf_counter()
    epochs, lr = args.epochs or RECIPES[name].epochs, args.lr or RECIPES[name].lr
    best_path, last_path = (args.output_dir / f"{kind}_{name}.pth" for kind in ("best", "last"))
    for path in best_path, last_path:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: move it away, this run saves a file there")
        checkpoint.temporary_name(path).unlink(missing_ok=True)

    loaders = get_loaders(args.batch_size, seed=args.seed, device=args.device, data_dir=args.data_dir)
    train_loader, validation_loader, test_loader = loaders
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # nothing here draws from it, but its state is saved
    model = getattr(models, name)()
    print(f"{name} on {args.device}, seed {args.seed}")
    summary(copy.deepcopy(model).eval(), (1, 28, 28), device="cpu")
    sizes = [f"{len(loader.dataset):,}" for loader in loaders]
    print("Images: {} for training, {} for validation, {} for the test\n".format(*sizes))

    model.to(args.device)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3)
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    flags = {"model": name, "seed": args.seed, "batch-size": args.batch_size, "lr": lr}
    generator = train_loader.sampler.generator
    history, best = [], {}  # rows of training loss, training accuracy, validation accuracy, learning rate

    def best_epoch():
        accuracies = [row[2] for row in history]
        return accuracies.index(max(accuracies)) + 1

    def finished():
        waited = args.early_stopping and history and len(history) - best_epoch() >= args.early_stopping
        return waited or len(history) >= epochs

    def state():
        return {
            "layout": checkpoint.LAYOUT,
            "flags": flags,
            "history": history,
            "best": best,
            "random": checkpoint.random_states(generator, args.device),
            **{name: part.state_dict() for name, part in parts.items()},
        }

    if args.resume and last_path.exists():
        expected = state() | {"best": model.state_dict(), "optimizer": state_after_a_step(optimizer)}
        saved = checkpoint.read_state(last_path, expected)
        history, best = saved["history"], saved["best"]
        checkpoint.restore(saved, parts, generator, args.device, last_path)
        checkpoint.save(best, best_path)  # a run that was killed between its two files has left an older one
        args.saved = f"epoch {len(history)} is saved in {last_path}"
        print(f"{last_path} is {'finished' if finished() else 'resumed'} after epoch {len(history)}")
    elif args.resume:
        print(f"There is no {last_path} to resume: starting from the beginning")

    while not finished():
        epoch = len(history) + 1
        loss, training_accuracy = train_epoch(model, average, train_loader, optimizer, epoch)
        accuracy = evaluate(average, validation_loader)
        print(f"Epoch: {epoch}/{epochs}")
        print(f"Training Loss: {loss:.3f}")
        print(f"Training Accuracy: {training_accuracy:.2%}")
        print(f"Validation Accuracy: {accuracy:.2%}")
        print("-" * 50)

        lr = optimizer.param_groups[0]["lr"]
        history.append((loss, training_accuracy, accuracy, lr))
        scheduler.step(accuracy)
        if optimizer.param_groups[0]["lr"] < lr:
            print(f"Learning rate lowered to {optimizer.param_groups[0]['lr']:g}")
        if best_epoch() == epoch:
            best = {key: value.cpu().clone() for key, value in average.state_dict().items()}
        checkpoint.save(state(), last_path, keep=best_path if epoch == 1 else None)
        if best_epoch() == epoch:
            checkpoint.save(best, best_path)
        args.saved = f"epoch {epoch} is saved in {last_path}"
    if len(history) < epochs:
        print(f"Stopped early: no better epoch in the last {args.early_stopping}")

    average.load_state_dict(best)
    test_accuracy = evaluate(average, test_loader)
    print(f"Test Accuracy: {test_accuracy:.2%} (epoch {best_epoch()}, {best_path.name})")
    print(f"Time: {time.perf_counter() - started:.0f} s")
    return history[best_epoch() - 1][2], test_accuracy


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
    add("--resume", action="store_true", help="go on where last_<model>.pth in the output folder ends")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="has MNIST/raw; default: %(default)s")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="for the models; default: this one")
    return parser.parse_args(arguments)


def stop_at_signals(args):
    """Has Ctrl-C, `kill` and a lost terminal end the program at once, saying what is saved.

    Nothing is finished or tidied up: the files are whole at every moment, and to go on like that is
    safer than an exception out of nowhere.
    """

    def stop(number, frame):
        with contextlib.suppress(OSError, RuntimeError):  # the terminal is gone, or a line is half printed
            sys.stdout.flush()
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # the bar
        command = shlex.join(["python", *sys.argv] + ["--resume"] * (not args.resume))
        message = f"{clear}{signal.Signals(number).name}: {args.saved}; go on with: {command}\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
        os._exit(128 + number)

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, stop)


def main():
    args = parse_args()
    args.saved = "nothing of this run is saved yet"
    stop_at_signals(args)
    sys.stdout.reconfigure(line_buffering=True)  # whoever follows a log sees each line at once
    names = list(RECIPES) if args.model == "all" else [args.model]
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):  # better found out now than after an epoch
            pass
        checkpoint.lock(args.output_dir)
        for name in names:
            train(name, args)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: error: {error}")
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        sys.exit(f"train.py: error: {args.device} has too little memory: try a smaller --batch-size")


if __name__ == "__main__":
    main()
