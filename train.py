"""Train a tiny MNIST classifier and report its test accuracy.

python train.py                                  # Model_3, the advanced one
python train.py --model Model_1 --seed 1
python train.py --model all --output-dir runs
python train.py --resume                         # resume an interrupted run
python train.py --runs 10                        # seeds 0 to 9: mean, spread and ensemble
torchrun --nproc-per-node=2 train.py --folds 5   # cross-validation, two folds at a time
"""

from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import contextlib
import math
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
from torch import optim
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchsummary import summary
from tqdm import tqdm

from datafile import BACKGROUND, DATA_DIR, DataError, get_loaders
from models import MODELS
from support import checkpoint, device, flags, plots, process, workers
from support.augmentation import augment
from support.checkpoint import TrainingState
from support.metrics import accuracy, predict, print_runs


class Recipe(NamedTuple):
    """Per-model hyperparameters."""

    epochs: int
    lr: dict  # initial learning rate, by optimizer


RECIPES = {
    "Model_1": Recipe(2, {"adam": 0.01, "adamw": 0.01, "nadam": 0.01, "radam": 0.01, "sgd": 0.03}),
    "Model_2": Recipe(12, {"adam": 0.005, "adamw": 0.005, "nadam": 0.005, "radam": 0.01, "sgd": 0.03}),
    "Model_3": Recipe(15, {"adam": 0.01, "adamw": 0.01, "nadam": 0.01, "radam": 0.01, "sgd": 0.1}),
}
OPTIMIZERS = {
    "adam": partial(optim.Adam, fused=True),
    "adamw": partial(optim.AdamW, fused=True),
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "sgd": partial(optim.SGD, momentum=0.9, nesterov=True, fused=True),
}
BAR = {"leave": False, "dynamic_ncols": True, "bar_format": "{desc} {n_fmt}/{total_fmt}{postfix} |{bar}|"}
WARM_UP = 100  # linear warm-up, in steps; at most the first epoch


def train_epoch(model, average, loader, optimizer, epoch, augmented=True):
    """Trains for one epoch (counted from 1) and updates the weight average after every step.

    Returns:
        Mean training loss and accuracy (a fraction), accumulated during the epoch.

    Raises:
        FloatingPointError: the loss of a step is not finite.
    """
    model.train()
    averaged, weights = map(floating_point_tensors, (average, model))
    lr = optimizer.param_groups[0]["lr"]
    losses, correct, seen = [], [], 0  # per-batch sums; kept on the device to avoid synchronization
    show_bar = workers.RANK == 0 and sys.stderr is not None and sys.stderr.isatty()
    with tqdm(loader, f"Epoch {epoch}", disable=not show_bar, **BAR) as bar:
        for step, (images, labels) in enumerate(bar, 1):
            if epoch == 1:
                optimizer.param_groups[0]["lr"] = lr * min(1, step / min(WARM_UP, len(loader)))
            logits = model(augment(images, BACKGROUND) if augmented else images)
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_average(averaged, weights, 9 / (9 + (epoch - 1) * len(loader) + step))
            losses.append(loss.detach() * len(labels))
            correct.append((logits.argmax(1) == labels).sum())
            seen += len(labels)
            if show_bar and step % 50 == 0:
                means = [float(torch.stack(sums).sum()) / seen for sums in (losses, correct)]
                bar.set_postfix_str("loss {:.3f}, {:.2%}".format(*means), refresh=False)
    losses, correct = (torch.stack(sums).cpu().tolist() for sums in (losses, correct))
    for step, loss in enumerate(losses, 1):
        check_finite(loss, f"in epoch {epoch}, step {step}", lr)
    return sum(losses) / seen, sum(correct) / seen


def check_finite(loss, where, lr):
    """Raises FloatingPointError if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss} {where}, at learning rate {lr:g}: try a lower --lr")


def floating_point_tensors(model):
    """Returns the floating-point tensors of a model's state dict: the ones that can be averaged."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def update_average(averaged, weights, weight):
    """Updates the average in place: `averaged += weight * (weights - averaged)`.

    With weight = (eta + 1) / (t + eta) at step t this is polynomial-decay averaging, here with eta = 8 but
    for an offset of one step: the effective window is the last ninth of the steps so far. O. Shamir,
    T. Zhang, "Stochastic gradient descent for non-smooth optimization", ICML 2013. (`AveragedModel` of
    `torch.optim.swa_utils` synchronizes with the device on every call.)
    """
    torch._foreach_lerp_(averaged, weights, weight)


def create_training_state(name, args, seed, fold, loaders):
    """Returns a new `TrainingState` for the model with this name, and prints its configuration."""
    lr = args.lr or RECIPES[name].lr[args.optimizer]
    options = {flag: getattr(args, flag) for flag in ("optimizer", "batch_size", "augment")}
    settings = {"seed": seed, "folds": f"{fold}/{args.folds}" if fold else "none"} | options | {"lr": lr}
    print(f"{name} on {args.device}, " + ", ".join(f"{flag} {value}" for flag, value in settings.items()))
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    sizes = (len(loader.dataset) for loader in loaders[:3])
    print("Images: {:,} for training, {:,} for validation, {:,} for testing\n".format(*sizes))
    settings |= {"model": name, "data_dir": f"<SHA-256 {loaders.digest[:12]}...>"}
    torch.manual_seed(seed)
    model = MODELS[name]().to(args.device)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=lr)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3)
    return TrainingState(model, optimizer, scheduler, loaders.generator, settings)


def run_epoch(state, loaders, augmented):
    """Runs one epoch of training and validation, steps the scheduler and records the metrics.

    Raises:
        FloatingPointError: the loss or a weight is not finite.
    """
    epoch, optimizer = len(state.history) + 1, state.optimizer
    lr = optimizer.param_groups[0]["lr"]
    metrics = train_epoch(state.model, state.average, loaders.train, optimizer, epoch, augmented)
    logits, labels = predict(state.average, loaders.validation)
    loss = cross_entropy(logits, labels).item()
    if checkpoint.find_not_finite(state.average.state_dict()):
        loss = math.nan
    check_finite(loss, f"after epoch {epoch}", lr)
    validation_accuracy = accuracy(logits, labels)
    state.scheduler.step(validation_accuracy)
    state.add_epoch(lr, *metrics, loss, validation_accuracy)


def print_epoch(state, epochs):
    """Prints the metrics of the last epoch."""
    metrics, lr = state.history[-1], state.optimizer.param_groups[0]["lr"]
    print(f"Epoch: {len(state.history)}/{epochs}")
    print(f"Training Loss: {metrics['training_loss']:.3f}")
    print(f"Training Accuracy: {metrics['training_accuracy']:.2%}")
    print(f"Validation Accuracy: {metrics['validation_accuracy']:.2%}")
    print("-" * 50)
    if lr < metrics["lr"]:
        print(f"Learning rate lowered to {lr:g}")


def train(name, args, seed, fold=None):
    """Trains a model, saves the weights of its best epoch and prints their test accuracy.

    The validation set determines the best epoch, the learning rate and early stopping; the test set is
    evaluated once, at the end. If `fold` (1 to `args.folds`) is given, that fold is the validation set.

    Returns:
        The validation and test accuracy of the saved weights, fractions; the logits of the test images,
        float32 (N, 10), and their labels, int64 (N,), both on the CPU.
    """
    started, epochs = time.perf_counter(), args.epochs or RECIPES[name].epochs
    suffix = f"_fold{fold}" if fold else f"_seed{seed}" if args.runs else ""
    last_path, best_path = (args.output_dir / f"{prefix}_{name}{suffix}.pth" for prefix in ("last", "best"))
    folds = (fold, args.folds) if fold else None
    loaders = get_loaders(args.batch_size, None, seed, args.device, args.data_dir, folds, args.augment)
    state = create_training_state(name, args, seed, fold, loaders)
    resumed = args.resume and last_path.exists()
    if resumed:
        state.resume(last_path, best_path)
        process.saved = f"epoch {len(state.history)} is saved in {last_path}"
        print(f"Resuming from {last_path} (epoch {len(state.history)})")
    else:
        if args.resume:
            print(f"{last_path}: no such file, starting from the beginning")
        checkpoint.back_up(last_path, best_path)  # so that this run overwrites only its own files
    device.keep_freed_memory()
    while not state.is_finished(epochs, args.early_stopping):
        run_epoch(state, loaders, args.augment)
        state.save(last_path, best_path)  # save first, so that every epoch printed can be resumed from
        process.saved = f"epoch {len(state.history)} is saved in {last_path}"
        print_epoch(state, epochs)
    if len(state.history) < epochs:
        print(f"Early stopping: no improvement for {args.early_stopping} epochs")
    best_epoch = state.best_epoch()
    state.average.load_state_dict(state.best)
    logits, labels = predict(state.average, loaders.test)
    test_accuracy = accuracy(logits, labels)
    print(f"Test Accuracy: {test_accuracy:.2%} (epoch {best_epoch}, {best_path.name})")
    if args.plot:
        print(f"See {plots.curves(state.history, best_epoch, args.plot / f'curves_{name}{suffix}.png')}")
    print(f"Time: {time.perf_counter() - started:.0f} s{' since resuming' if resumed else ''}")
    return state.history[best_epoch - 1]["validation_accuracy"], test_accuracy, logits, labels


def train_runs(name, args):
    """Trains the `args.runs` or `args.folds` runs of a model and prints a summary, with their ensemble.

    With torchrun, the runs are distributed over the workers; only rank 0 prints.
    """
    if args.folds:
        runs = {f"fold {fold}": (args.seed, fold) for fold in range(1, args.folds + 1)}
    else:
        runs = {f"seed {seed}": (seed,) for seed in range(args.seed, args.seed + args.runs)}
    own = list(runs)[workers.RANK :: workers.WORLD_SIZE]
    shares = workers.gather({run: train(name, args, *runs[run]) for run in own})
    print_runs(name, {run: share[run] for run in runs for share in shares if run in share})


def parse_args(arguments=None):
    """Parses the command line (or `arguments`, if given)."""
    parser = argparse.ArgumentParser(description="Train a tiny MNIST classifier and report its accuracy.")
    add, count = parser.add_argument, flags.integer(1, 10**6)
    add("--model", choices=[*RECIPES, "all"], default="Model_3", help="model to train (default: %(default)s)")
    add("--epochs", type=count, metavar="N", help="number of epochs (default: 2, 12, 15, by model)")
    add("--batch-size", type=count, default=128, metavar="N", help="batch size (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="optimizer (default: %(default)s)")
    add("--lr", type=flags.positive_number, metavar="LR", help="learning rate (default: 0.01, 0.005, 0.01)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="augment training images")
    add("--seed", type=flags.integer(0, 2**62), default=0, metavar="N", help="random seed (default: 0)")
    add("--device", type=device.device, help="device to train on (default: cuda if available, else cpu)")
    add("--early-stopping", type=count, metavar="N", help="stop after N epochs without improvement")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--runs", type=flags.integer(2, 1_000), metavar="N", help="train with N seeds")
    several.add_argument("--folds", type=flags.integer(2, 1_000), metavar="K", help="K-fold cross-validation")
    add("--resume", action="store_true", help="resume from last_<model>.pth in the output directory")
    add("--plot", type=flags.path, metavar="DIR", help="directory for loss curves (requires matplotlib)")
    add("--data-dir", type=flags.path, default=DATA_DIR, metavar="DIR", help="directory with MNIST/raw")
    add("--output-dir", type=flags.path, default=".", metavar="DIR", help="directory for checkpoints")
    args = parser.parse_args(arguments)
    if workers.WORLD_SIZE > 1 and not (args.runs or args.folds):  # a batch is too little work to share
        parser.error("torchrun with several workers requires --runs or --folds")
    return args


def main():
    args, advice = parse_args(), "try a smaller --batch-size or another --device"
    errors = DataError, checkpoint.CheckpointError, plots.PlotError, FloatingPointError
    with process.exit_on_signals(), process.exit_on_error(*errors, memory_advice=advice):
        process.line_buffer_stdout()
        process.make_writable(args.output_dir)
        if args.plot:
            plots.prepare(args.plot)
        args.device = device.select_device(args.device)
        lock = contextlib.nullcontext() if workers.LOCAL_RANK else process.locked(args.output_dir)
        with workers.process_group(), lock:
            workers.gather()  # barrier: wait for rank 0 to lock the directory
            for name in RECIPES if args.model == "all" else [args.model]:
                summary(MODELS[name]().eval(), (1, 28, 28), device="cpu")
                if args.runs or args.folds:
                    train_runs(name, args)
                else:
                    train(name, args, args.seed)


if __name__ == "__main__":
    main()
