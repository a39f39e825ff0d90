"""Train a tiny MNIST classifier and report its test accuracy.

python train.py                                  # Model_3, the advanced one
python train.py --model Model_1 --seed 1
python train.py --model all --output-dir runs
python train.py --resume                         # resume an interrupted run
python train.py --runs 10                        # seeds 0 to 9: mean, spread and ensemble
torchrun --nproc-per-node=2 train.py --folds 5   # cross-validation, two folds at a time
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P and -I, which leave it out
from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import contextlib
import time
from functools import partial
from typing import NamedTuple

import torch
from torch import optim
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchsummary import summary
from tqdm import tqdm

from datafile import BACKGROUND, DATA_DIR, find_raw_dir, get_loaders
from models import MODELS
from support import checkpoint, devices, distributed, files, flags, plots, process
from support.augmentation import augment
from support.checkpoint import TrainingState
from support.metrics import accuracy, predict, print_runs


class Recipe(NamedTuple):
    """Per-model hyperparameters; the defaults are for models without an entry in `RECIPES`."""

    epochs: int = 15
    lr: float = 0.01  # initial learning rate; the optimizers have multiples of it


RECIPES = {
    "Model_1": Recipe(epochs=2, lr=0.01),
    "Model_2": Recipe(epochs=12, lr=0.005),
    "Model_3": Recipe(epochs=15, lr=0.01),
}
OPTIMIZERS = {  # and the multiple of the recipe's learning rate
    "adam": (partial(optim.Adam, fused=True), 1),
    "adamw": (partial(optim.AdamW, fused=True), 1),
    "nadam": (optim.NAdam, 1),
    "radam": (optim.RAdam, 1),
    "sgd": (partial(optim.SGD, momentum=0.9, nesterov=True, fused=True), 5),
}
BAR = {"leave": False, "dynamic_ncols": True, "bar_format": "{desc} {n_fmt}/{total_fmt}{postfix} |{bar}|"}
WARM_UP = 100  # length of the linear warm-up in steps, capped at one epoch


def train_epoch(model, average, loader, optimizer, epoch, augmented=True):
    """Trains for one epoch and updates the weight average after every step; `epoch` counts from 1.

    Returns:
        Mean training loss and accuracy (a fraction), accumulated during the epoch.

    Raises:
        FloatingPointError: the loss of a step is not finite.
    """
    model.train()
    averaged, weights = map(floating_point_tensors, (average, model))
    lr = optimizer.param_groups[0]["lr"]
    losses, correct, seen = [], [], 0  # per-batch sums; kept on the device to avoid synchronization

    def compute_gradients(images, labels):
        logits = model(augment(images, BACKGROUND) if augmented else images)
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        return logits.detach(), loss.detach()

    show_bar = distributed.RANK == 0 and sys.stderr is not None and sys.stderr.isatty()
    with tqdm(loader, f"Epoch {epoch}", disable=not show_bar, **BAR) as bar:
        for step, (images, labels) in enumerate(bar, 1):
            if epoch == 1:
                optimizer.param_groups[0]["lr"] = lr * min(1, step / min(WARM_UP, len(loader)))
            if step == 4 and images.is_cuda:  # the first steps create whatever is created once
                compute_gradients = devices.capture(compute_gradients, images, labels)
            logits, loss = compute_gradients(images, labels)
            optimizer.step()
            update_average(averaged, weights, 9 / (9 + (epoch - 1) * len(loader) + step))
            losses.append(loss * len(labels))
            correct.append((logits.argmax(1) == labels).sum())
            seen += len(labels)
            if show_bar and step % 50 == 0:
                means = [float(torch.stack(sums).sum()) / seen for sums in (losses, correct)]
                bar.set_postfix_str("loss {:.3f}, {:.2%}".format(*means), refresh=False)
    losses, correct = (torch.stack(sums).cpu() for sums in (losses, correct))
    if not losses.isfinite().all():
        step = int(losses.isfinite().int().argmin()) + 1
        where = f"in epoch {epoch}, step {step}, at learning rate {lr:g}"
        raise FloatingPointError(f"the loss became {losses[step - 1]} {where}: try a lower --lr")
    return sum(losses.tolist()) / seen, sum(correct.tolist()) / seen


def floating_point_tensors(model):
    """Returns the floating-point tensors of a model's state dict: the ones that can be averaged."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def update_average(averaged, weights, weight):
    """Updates the average in place: `averaged += weight * (weights - averaged)`.

    With weight = 9 / (9 + t) at step t, this is polynomial-decay averaging (eta = 8), one step late: the
    effective window is the last ninth of the steps so far. O. Shamir, T. Zhang, "Stochastic gradient descent
    for non-smooth optimization", ICML 2013. (`AveragedModel` of `torch.optim.swa_utils` synchronizes with
    the device on every call.)
    """
    torch._foreach_lerp_(averaged, weights, weight)


def keep_freed_memory():
    """Raises glibc's mmap threshold so that memory freed by one step is reused by the next.

    Otherwise it is returned to the kernel and zeroed on reuse, which can take up to half of a CPU step.
    The threshold becomes the size of the largest block freed so far, up to 32 MiB.
    """
    torch.empty(33_000_000, dtype=torch.uint8)


def get_recipe(name):
    """Returns the recipe of a model."""
    return RECIPES.get(name, Recipe())


def create_training_state(name, args, seed, fold, loaders):
    """Returns a new `TrainingState` for the model with this name."""
    create_optimizer, multiple = OPTIMIZERS[args.optimizer]
    lr = args.lr or multiple * get_recipe(name).lr
    settings = {"--model": name, "--seed": seed}
    settings |= {"--folds": f"{fold[1]} (fold {fold[0]})"} if fold else {}
    settings |= {"--optimizer": args.optimizer, "--lr": lr, "--batch-size": args.batch_size}
    settings |= {"--augment": args.augment, "--data-dir": loaders.digest}
    torch.manual_seed(seed)
    model = MODELS[name]().to(args.device)
    optimizer = create_optimizer(model.parameters(), lr=lr)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3)
    return TrainingState(model, optimizer, scheduler, loaders.generator, settings)


def print_header(name, args, state, loaders, with_summary):
    """Prints what will be run."""
    typed = [
        flags.spell(*item) for item in state.settings.items() if item[0] not in ("--model", "--data-dir")
    ]
    print(f"{name} on {args.device}: {' '.join(typed)}")
    threads = torch.get_num_threads()
    print(f"PyTorch {torch.__version__}, {threads} CPU thread{'s' * (threads > 1)}")
    sizes = (len(loader.dataset) for loader in loaders[:3])
    print("Images: {:,} for training, {:,} for validation, {:,} for testing\n".format(*sizes))
    if with_summary:
        with torch.random.fork_rng(devices=[]):  # torchsummary draws random images
            summary(MODELS[name]().eval(), (1, 28, 28), device="cpu")


def run_epoch(state, loaders, augmented):
    """Runs one epoch of training and validation, steps the scheduler and records the metrics.

    Raises:
        FloatingPointError: the loss of a step or a weight is not finite.
    """
    epoch, optimizer = len(state.history) + 1, state.optimizer
    lr = optimizer.param_groups[0]["lr"]
    metrics = train_epoch(state.model, state.average, loaders.train, optimizer, epoch, augmented)
    if weight := checkpoint.find_not_finite(state.average.state_dict()):
        where = f"after epoch {epoch}, at learning rate {lr:g}"
        raise FloatingPointError(f"{weight} has values that are not finite {where}: try a lower --lr")
    logits, labels = predict(state.average, loaders.validation)
    loss = cross_entropy(logits, labels).item()
    validation_accuracy = accuracy(logits, labels)
    state.scheduler.step(validation_accuracy)
    state.add_epoch(lr, *metrics, loss, validation_accuracy)


def print_epoch(state, epochs):
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
    evaluated once, at the end. If `fold` is given, a pair (k, K), fold k of K is the validation set.

    Returns:
        The validation and test accuracy of the saved weights, fractions; the logits of the test images,
        float32 (N, 10), and their labels, int64 (N,), both on the CPU.
    """
    started, epochs = time.perf_counter(), args.epochs or get_recipe(name).epochs
    suffix = f"_fold{fold[0]}" if fold else f"_seed{seed}" if args.runs else ""
    last_path, best_path = (args.output_dir / f"{prefix}_{name}{suffix}.pth" for prefix in ("last", "best"))
    loaders = get_loaders(args.batch_size, None, seed, args.device, args.data_dir, fold, args.augment)
    state = create_training_state(name, args, seed, fold, loaders)
    resumed = args.resume and last_path.exists()
    if resumed:
        state.resume(last_path, best_path)
    print_header(name, args, state, loaders, seed == args.seed and (not fold or fold[0] == 1))
    if resumed:
        process.saved = f"epoch {len(state.history)} is saved in {last_path}"
        print(f"Resuming from {last_path} (epoch {len(state.history)})")
    else:
        if args.resume:
            print(f"{last_path}: no such file, starting from the beginning")
        checkpoint.back_up(last_path, best_path)  # so that this run overwrites only its own files
    keep_freed_memory()
    while not state.is_finished(epochs, args.early_stopping):
        run_epoch(state, loaders, args.augment)
        state.save(last_path, best_path)  # save first, so that every epoch printed can be resumed from
        process.saved = f"epoch {len(state.history)} is saved in {last_path}"
        print_epoch(state, epochs)
    if len(state.history) < epochs:
        print(f"Early stopping: no improvement for {args.early_stopping} epochs")
    best_epoch = checkpoint.best_epoch(state.history)
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

    With torchrun, the runs are distributed over its processes; only rank 0 prints.
    """
    if args.folds:
        runs = {f"fold {k}": (args.seed, (k, args.folds)) for k in range(1, args.folds + 1)}
    else:
        runs = {f"seed {seed}": (seed,) for seed in range(args.seed, args.seed + args.runs)}
    own = list(runs)[distributed.RANK :: distributed.WORLD_SIZE]
    shares = distributed.all_gather({run: train(name, args, *runs[run]) for run in own})
    print_runs(name, {run: share[run] for run in runs for share in shares if run in share})


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description="Train a tiny MNIST classifier and report its accuracy.")
    add, count = parser.add_argument, flags.integer(1, 10**6)
    recipes = zip(*map(get_recipe, MODELS))
    epochs, rates = (", ".join(map(str, values)) for values in recipes)
    multiples = "".join(f"; times {x} for {name}" for name, (_, x) in OPTIMIZERS.items() if x != 1)
    add("--model", choices=[*MODELS, "all"], default="Model_3", help="model to train (default: %(default)s)")
    add("--epochs", type=count, metavar="N", help=f"number of epochs (default: {epochs}, by model)")
    add("--batch-size", type=count, default=128, metavar="N", help="batch size (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="optimizer (default: %(default)s)")
    help_ = f"initial learning rate (default: {rates}, by model{multiples})"
    add("--lr", type=flags.positive_number, metavar="LR", help=help_)
    help_ = "augment training images (default: --augment)"
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help=help_)
    add("--seed", type=flags.integer(0, 2**62), default=0, metavar="N", help="random seed (default: 0)")
    help_ = "device to train on (default: cuda if available, else cpu)"
    add("--device", type=devices.parse_device, metavar="NAME", help=help_)
    add("--early-stopping", type=count, metavar="N", help="stop after N epochs without improvement")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--runs", type=flags.integer(2, 1_000), metavar="N", help="train with N seeds")
    several.add_argument("--folds", type=flags.integer(2, 1_000), metavar="K", help="K-fold cross-validation")
    add("--resume", action="store_true", help="resume from last_<model>.pth in the output directory")
    add("--plot", type=flags.path, metavar="DIR", help="directory for loss curves (requires matplotlib)")
    help_ = "directory with MNIST/raw or the four files (default: data, beside this script)"
    add("--data-dir", type=flags.path, default=DATA_DIR, metavar="DIR", help=help_)
    help_ = "directory for checkpoints (default: the current directory)"
    add("--output-dir", type=flags.path, default=".", metavar="DIR", help=help_)
    args = parser.parse_args(arguments)
    if distributed.WORLD_SIZE > 1 and not (args.runs or args.folds):  # a batch is too little work to share
        parser.error("torchrun with several processes requires --runs or --folds")
    return args


def main():
    args, memory_advice = parse_args(), "try a smaller --batch-size or another --device"
    with process.exit_on_signals(), process.exit_on_error(FloatingPointError, memory_advice=memory_advice):
        process.line_buffer_stdout()
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
