"""Train a tiny MNIST classifier and report its test accuracy.

python train.py                                  # Model_3, the most accurate one
python train.py --model all --seed 1 --output-dir runs
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
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import torch
from torch import optim
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from datafile import BACKGROUND, DATA_DIR, describe, find_raw_dir, get_loaders
from models import MODELS
from support import checkpoint, devices, distributed, exits, files, plots
from support.augmentation import augment
from support.flags import format_flag, int_between, path_type, positive_number
from support.metrics import RunResult, accuracy, predict, print_epoch, print_runs, print_summary


class Recipe(NamedTuple):
    """Per-model hyperparameters; the defaults are for models without an entry in `RECIPES`."""

    epochs: int = 15
    lr: float = 0.01  # initial learning rate


RECIPES = defaultdict(
    Recipe,
    Model_1=Recipe(epochs=2, lr=0.01),
    Model_2=Recipe(epochs=12, lr=0.005),
    Model_3=Recipe(epochs=15, lr=0.01),
)
OPTIMIZERS = {  # name: (class, factor on the recipe's learning rate)
    "adam": (partial(optim.Adam, fused=True), 1),
    "adamw": (partial(optim.AdamW, fused=True), 1),
    "nadam": (optim.NAdam, 1),
    "radam": (optim.RAdam, 1),
    "sgd": (partial(optim.SGD, momentum=0.9, nesterov=True, fused=True), 5),
}
AVERAGED = 9  # the weight average covers roughly the last 1/AVERAGED of the steps
PLATEAU = {"mode": "max", "factor": 0.1, "patience": 3}  # of ReduceLROnPlateau, on validation accuracy
# The flags that may differ when a run is resumed; all others must be the same.
RESUMABLE = "epochs", "device", "early_stopping", "runs", "folds", "resume", "plot", "data_dir", "output_dir"
BAR = {"leave": False, "dynamic_ncols": True, "bar_format": "{desc} {n_fmt}/{total_fmt}{postfix} |{bar}|"}


def train_epoch(model, average_model, loader, optimizer, epoch, augmented=True):
    """Trains for one epoch and updates the weight average after every step; `epoch` counts from 1.

    Returns:
        Mean training loss and accuracy (a fraction), accumulated during the epoch.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.train()
    current = floating_point_tensors(model)
    average = floating_point_tensors(average_model)
    total_loss = 0  # a tensor on the device after the first step, as is `correct`: no synchronization
    correct = 0
    seen = 0

    def compute_gradients(images, labels):
        logits = model(augment(images, BACKGROUND) if augmented else images)
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        return logits.detach(), loss.detach()

    show_bar = distributed.RANK == 0 and sys.stderr is not None and sys.stderr.isatty()
    with tqdm(loader, f"Epoch {epoch}", disable=not show_bar, **BAR) as bar:
        for step, (images, labels) in enumerate(bar, 1):
            if step == 4 and images.is_cuda:  # by now, cuDNN has chosen its kernels; captured once an epoch
                compute_gradients = devices.capture(compute_gradients, images, labels)
            logits, loss = compute_gradients(images, labels)
            optimizer.step()
            steps = (epoch - 1) * len(loader) + step
            update_average(average, current, AVERAGED / (AVERAGED + steps))
            total_loss += loss * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            seen += len(labels)
            if show_bar and step % 50 == 0:
                bar.set_postfix_str(f"loss {total_loss / seen:.3f}, {correct / seen:.2%}", refresh=False)
    mean_loss = total_loss.cpu().item() / seen
    if not math.isfinite(mean_loss):
        raise FloatingPointError(f"the loss became {mean_loss} in epoch {epoch}: try a lower --lr")
    return mean_loss, correct.cpu().item() / seen


def floating_point_tensors(model):
    """Returns the floating-point tensors of a model's state dict: the ones that can be averaged."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def update_average(average, current, fraction):
    """Updates the average in place: `(1 - fraction) * average + fraction * current`, for lists of tensors.

    With fraction = 9 / (9 + t) at step t, this is polynomial-decay averaging (eta = 8) that counts the
    initial weights as the first iterate: roughly the mean of the last ninth of the steps. O. Shamir,
    T. Zhang, "Stochastic gradient descent for non-smooth optimization", ICML 2013.
    """
    # PyTorch's `AveragedModel` synchronizes with the device at every call; `lerp` makes infinite values NaN.
    torch._foreach_mul_(average, 1 - fraction)
    torch._foreach_add_(average, current, alpha=fraction)


def create_training_state(name, args, seed, fold, loaders):
    """Returns a new `TrainingState`; its settings are all flags but `RESUMABLE`, and the data's digest."""
    settings = {flag: value for flag, value in vars(args).items() if flag not in RESUMABLE}
    settings |= {"model": name, "seed": seed, "data_dir": loaders.digest}
    settings["lr"] = args.lr or OPTIMIZERS[args.optimizer][1] * RECIPES[name].lr
    if fold:
        settings["folds"] = f"{fold[1]} (fold {fold[0]})"
    torch.manual_seed(seed)
    model = MODELS[name]().to(args.device)
    optimizer_class, _ = OPTIMIZERS[args.optimizer]
    optimizer = optimizer_class(model.parameters(), lr=settings["lr"])
    scheduler = ReduceLROnPlateau(optimizer, **PLATEAU)
    return checkpoint.TrainingState(model, optimizer, scheduler, loaders.generator, settings)


def print_header(name, args, state, loaders):
    """Prints what will be run."""
    settings = state.settings.items()
    flags = [format_flag(flag, value) for flag, value in settings if flag not in ("model", "data_dir")]
    print(f"{name} on {args.device}: {' '.join(flags)}")
    print(f"PyTorch {torch.__version__}, CPU threads: {torch.get_num_threads()}")
    print(describe(loaders.raw_dir, loaders.digest))
    sizes = [f"{len(loader.dataset):,}" for loader in loaders[:3]]
    print("Images: {} for training, {} for validation, {} for testing\n".format(*sizes))


def run_epoch(state, loaders, augmented):
    """Runs one epoch of training and validation, steps the scheduler and records the metrics.

    Raises:
        FloatingPointError: the loss of a step or a logit is not finite.
    """
    epoch = len(state.history) + 1
    lr = state.optimizer.param_groups[0]["lr"]
    loss, training_accuracy = train_epoch(
        state.model, state.average_model, loaders.train, state.optimizer, epoch, augmented
    )
    logits, labels = predict(state.average_model, loaders.validation)
    validation_accuracy = accuracy(logits, labels)
    state.scheduler.step(validation_accuracy)
    state.add_epoch(
        {
            "lr": lr,
            "training_loss": loss,
            "training_accuracy": training_accuracy,
            "validation_loss": cross_entropy(logits, labels).item(),
            "validation_accuracy": validation_accuracy,
        }
    )


def train(name, args, seed, fold=None):
    """Trains a model, saves the weights of its best epoch, prints their test accuracy; returns a `RunResult`.

    The validation set determines the best epoch, the learning rate and early stopping; the test set is
    evaluated once, at the end. If `fold` is given, a pair (k, K), fold k of K is the validation set.
    """
    started = time.perf_counter()
    suffix = f"_fold{fold[0]}" if fold else f"_seed{seed}" if args.runs else ""
    last_path = args.output_dir / f"last_{name}{suffix}.pth"
    best_path = args.output_dir / f"best_{name}{suffix}.pth"
    loaders = get_loaders(args.batch_size, seed, args.device, args.data_dir, fold, args.augment)
    if suffix in ("", f"_seed{args.seed}", "_fold1"):  # once for all runs
        print_summary(MODELS[name])
    state = create_training_state(name, args, seed, fold, loaders)
    print_header(name, args, state, loaders)
    resumed = args.resume and last_path.exists()
    if resumed:
        state.resume(last_path, best_path)
        print(f"Resuming from {last_path} (epoch {len(state.history)})")
    else:
        if args.resume:
            print(f"{last_path}: no such file, starting from the beginning")
        checkpoint.back_up(last_path, best_path)  # so that this run overwrites only its own files
    try:
        epochs = args.epochs or RECIPES[name].epochs
        while not state.is_finished(epochs, args.early_stopping):
            run_epoch(state, loaders, args.augment)
            state.save(last_path, best_path)  # save first, so that every epoch printed can be resumed from
            print_epoch(state, epochs)
        if len(state.history) < epochs:
            print(f"Early stopping: no improvement for {args.early_stopping} epochs")
        kept_epoch = checkpoint.epoch_to_keep(state.history)
        state.average_model.load_state_dict(state.best)
        logits, labels = predict(state.average_model, loaders.test)
        validation_accuracy = state.history[kept_epoch - 1]["validation_accuracy"]
        result = RunResult(validation_accuracy, accuracy(logits, labels), logits, labels)
        print(f"Test Accuracy: {result.test_accuracy:.2%} (epoch {kept_epoch}, {best_path.name})")
    except BaseException as error:
        if state.saved_epochs:
            error.saved = f"epoch {state.saved_epochs} is saved in {last_path}"  # see `support.exits`
        raise
    if args.plot:
        try:
            plots.save(args.plot / f"curves_{name}{suffix}.png", plots.curves, state.history, kept_epoch)
        except exits.RunError as error:
            exits.warn(f"train.py: {error}")  # a plot that fails does not end the other runs
    print(f"Time: {time.perf_counter() - started:.0f} s{' since resuming' if resumed else ''}")
    return result


def train_runs(name, args):
    """Trains the `args.runs` or `args.folds` runs of a model and prints a summary, with their ensemble.

    With torchrun, the runs are distributed over its processes; only rank 0 prints.
    """
    if args.folds:
        runs = {f"fold {k}": (args.seed, (k, args.folds)) for k in range(1, args.folds + 1)}
    else:
        runs = {f"seed {seed}": (seed, None) for seed in range(args.seed, args.seed + args.runs)}
    own = list(runs)[distributed.RANK :: distributed.WORLD_SIZE]
    results = {}
    for share in distributed.all_gather({run: train(name, args, *runs[run]) for run in own}):
        results |= share
    print_runs(name, {run: results[run] for run in runs})


def parse_args(arguments=None):
    epochs = ", ".join(str(RECIPES[name].epochs) for name in MODELS)
    rates = ", ".join(str(RECIPES[name].lr) for name in MODELS)
    count = int_between(1, 10**6)
    several = int_between(2, 1_000)
    parser = argparse.ArgumentParser(description="Train a tiny MNIST classifier and report its accuracy.")
    parser.add_argument("--model", choices=[*MODELS, "all"], default="Model_3", help="default: %(default)s")
    parser.add_argument("--epochs", type=count, metavar="N", help=f"default: {epochs}, by model")
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default: %(default)s")
    parser.add_argument("--lr", type=positive_number, help=f"default: {rates}, by model; times 5 for sgd")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument("--seed", type=int_between(0, 2**62), default=0, metavar="N", help="default: 0")
    parser.add_argument("--device", type=devices.parse_device, help="default: cuda if available, else cpu")
    parser.add_argument("--early-stopping", type=count, metavar="N", help="epochs without improvement")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--runs", type=several, metavar="N", help="train with N seeds")
    many.add_argument("--folds", type=several, metavar="K", help="K-fold cross-validation")
    parser.add_argument("--resume", action="store_true", help="resume from last_<model>.pth")
    parser.add_argument("--plot", type=path_type, metavar="DIR", help="loss curves (requires matplotlib)")
    parser.add_argument("--data-dir", type=path_type, default=DATA_DIR, metavar="DIR", help="the data set")
    parser.add_argument("--output-dir", type=path_type, default=".", metavar="DIR", help="checkpoints")
    args = parser.parse_args(arguments)
    if distributed.WORLD_SIZE > 1 and not (args.runs or args.folds):  # a batch is too little work to share
        parser.error("torchrun with several processes requires --runs or --folds")
    return args


def main():
    args = parse_args()
    memory_advice = "try a smaller --batch-size or another --device"
    with exits.exit_on_signals(), exits.exit_on_error(FloatingPointError, memory_advice=memory_advice):
        exits.line_buffer_stdout()
        files.create_directory(args.output_dir)
        if args.plot:
            plots.prepare(args.plot)
        args.device = devices.select_device(args.device)
        lock = contextlib.nullcontext() if distributed.LOCAL_RANK else files.locked(args.output_dir)
        with distributed.process_group(), lock:
            if distributed.LOCAL_RANK == 0:
                find_raw_dir(args.data_dir)  # may download it
            distributed.barrier()
            for name in MODELS if args.model == "all" else [args.model]:
                if args.runs or args.folds:
                    train_runs(name, args)
                else:
                    train(name, args, args.seed)


if __name__ == "__main__":
    main()
