"""Train a tiny MNIST classifier and report how good it is.

python train.py                                  # Model_3, the advanced one
python train.py --model Model_1 --seed 1
python train.py --model all --output-dir runs
python train.py --resume                         # go on where an interrupted run was
python train.py --runs 10                        # seeds 0 to 9: mean, spread and ensemble
torchrun --nproc-per-node=2 train.py --folds 5   # cross-validation, two folds at a time
"""

from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import copy
import functools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import optim
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchsummary import summary
from tqdm import tqdm

import models
from datafile import DATA_DIR, DataError, augment, get_loaders
from support import checkpoint, flags, plots, process
from support.checkpoint import TrainingState
from support.metrics import accuracy, predict, print_runs


class Recipe(NamedTuple):
    """What differs from one model's training to another's."""

    epochs: int
    lr: dict  # each optimiser's learning rate at the start


RECIPES = {
    "Model_1": Recipe(2, {"adam": 0.01, "adamw": 0.01, "nadam": 0.01, "radam": 0.01, "sgd": 0.03}),
    "Model_2": Recipe(12, {"adam": 0.005, "adamw": 0.005, "nadam": 0.005, "radam": 0.01, "sgd": 0.03}),
    "Model_3": Recipe(15, {"adam": 0.01, "adamw": 0.01, "nadam": 0.01, "radam": 0.01, "sgd": 0.1}),
}
OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "sgd": functools.partial(optim.SGD, momentum=0.9, nesterov=True),
}
WARM_UP = 100  # steps over which the learning rate rises to its first value
FUSED = {"optimizers": ("adam", "adamw", "sgd"), "devices": ("cpu", "cuda", "mps")}  # one kernel for a step


def train_epoch(model, average, loader, optimizer, epoch, augmented=True):
    """Takes one optimiser step a batch, the average of the weights following each.

    Returns:
        The mean loss of the epoch and its accuracy (a fraction), on the images as the model saw
        them: augmented, with dropout, and by weights that were still changing.

    Raises:
        FloatingPointError: a step's loss is not finite.
    """
    model.train()
    averaged, values = floating_point(average), floating_point(model)
    lr = optimizer.param_groups[0]["lr"]
    losses, hits = [], []  # a batch's sums, on the device: nothing waits for it, but where a bar shows them
    seen = 0
    hidden = process.RANK > 0 or not process.is_terminal(sys.stderr)
    with tqdm(loader, f"Epoch {epoch}", leave=False, disable=hidden) as bar:
        for step, (images, labels) in enumerate(bar):
            steps_before = (epoch - 1) * len(loader) + step
            optimizer.param_groups[0]["lr"] = lr * min(1, (steps_before + 1) / WARM_UP)
            logits = model(augment(images) if augmented else images)
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_average(averaged, values, 9 / (10 + steps_before))  # spans the last ninth of all steps

            losses.append(loss.detach() * len(labels))
            hits.append((logits.argmax(1) == labels).sum())
            seen += len(labels)
            if step % 50 == 49 and not hidden:
                mean_loss, mean_hits = (float(torch.stack(sums).sum()) / seen for sums in (losses, hits))
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {mean_hits:.2%}", refresh=False)
    optimizer.param_groups[0]["lr"] = lr
    losses, hits = (torch.stack(values).cpu().tolist() for values in (losses, hits))
    for step, loss in enumerate(losses, 1):
        check_finite(loss, f"in epoch {epoch}, step {step}", optimizer)
    return sum(losses) / seen, sum(hits) / seen


def check_finite(loss, where, optimizer):
    """Raises FloatingPointError where a loss is not finite, saying where and what to do."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss} {where}, at a learning rate of {optimizer.param_groups[0]['lr']:g}: "
            "try a lower one (--lr)"
        )


def floating_point(model):
    """Returns a model's weights and batch normalisation's statistics, which an average can be taken of."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def update_average(averaged, values, weight):
    """Moves the tensors of the average towards those of the model by this weight.

    With a weight of (eta + 1) / (t + eta) at step t this is polynomial-decay averaging, here with eta = 8
    but for an offset of one step: O. Shamir, T. Zhang, "Stochastic gradient descent for non-smooth
    optimization", ICML 2013. (`torch.optim.swa_utils.AveragedModel` waits for the device at each call.)
    """
    torch._foreach_lerp_(averaged, values, weight)


def start(name, args, seed, fold, loaders):
    """Prints what is trained, how and on what, so that a log tells it without its command.

    Returns:
        A `TrainingState` in which no step was taken.
    """
    torch.manual_seed(seed)
    lr = args.lr or RECIPES[name].lr[args.optimizer]
    model = getattr(models, name)().to(args.device)
    part = f"{fold} of {args.folds}" if fold else "none"
    print(f"{name} on {args.device}, seed {seed}" + (f", fold {part}" if fold else ""))
    print(
        f"{args.optimizer}, learning rate {lr:g}, batches of {args.batch_size}, "
        f"{'augmented' if args.augment else 'not augmented'}, {torch.get_num_threads()} CPU threads, "
        f"PyTorch {torch.__version__}"
    )
    summary(copy.deepcopy(model).cpu().eval(), (1, 28, 28), device="cpu")
    sizes = [len(loader.dataset) for loader in loaders]
    print("Images: {:,} for training, {:,} for validation, {:,} for the test\n".format(*sizes))

    settings = {flag: getattr(args, flag) for flag in ("batch_size", "optimizer", "augment")}
    settings |= {"model": name, "seed": seed, "lr": lr, "folds": part}
    fused = args.optimizer in FUSED["optimizers"] and args.device.type in FUSED["devices"]
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=lr, **{"fused": True} if fused else {})
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3)
    return TrainingState(model, optimizer, scheduler, loaders[0].sampler.generator, settings)


def run_epoch(state, train_loader, validation_loader, augmented):
    """Trains and validates for an epoch, lowers the learning rate where it is time, and notes it all.

    Raises:
        FloatingPointError: the loss, or what the epoch has made of the weights, is not finite.
    """
    epoch, optimizer = len(state.history) + 1, state.optimizer
    lr = optimizer.param_groups[0]["lr"]
    loss, hits = train_epoch(state.model, state.average, train_loader, optimizer, epoch, augmented)
    logits, labels = (tensor.cpu() for tensor in predict(state.average, validation_loader))
    validation_loss, validation_accuracy = cross_entropy(logits, labels).item(), accuracy(logits, labels)
    is_broken = checkpoint.find_not_finite(state.state_dict())  # such a file would be refused
    check_finite(math.nan if is_broken else validation_loss, f"after epoch {epoch}", optimizer)
    state.scheduler.step(validation_accuracy)
    state.add_epoch(lr, loss, hits, validation_loss, validation_accuracy)


def print_epoch(state, epochs):
    """Prints what the last epoch has given."""
    epoch, lr = state.history[-1], state.optimizer.param_groups[0]["lr"]
    print(f"Epoch: {len(state.history)}/{epochs}")
    print(f"Training Loss: {epoch['training_loss']:.3f}")
    print(f"Training Accuracy: {epoch['training_accuracy']:.2%}")
    print(f"Validation Accuracy: {epoch['validation_accuracy']:.2%}")
    print("-" * 50)
    if lr < epoch["lr"]:
        print(f"Learning rate lowered to {lr:g}")


def fit(state, loaders, epochs, args, last_path, best_path):
    """Trains, validates and saves, epoch by epoch, until the last one or until nothing gets better."""
    if args.resume and last_path.exists():
        state.resume(last_path, best_path)
        how = "finished" if state.is_finished(epochs, args.early_stopping) else "resumed"
        print(f"{last_path} is {how} after epoch {len(state.history)}")
    else:
        if args.resume:
            print(f"There is no {last_path} to resume: starting from the beginning")
        checkpoint.set_aside(last_path)
    process.keep_freed_memory()
    while not state.is_finished(epochs, args.early_stopping):
        run_epoch(state, *loaders[:2], args.augment)
        state.save(last_path, best_path)  # before it is printed: whoever reads it can count on it
        print_epoch(state, epochs)
    if len(state.history) < epochs:
        print(f"Stopped early: no better epoch in the last {args.early_stopping}")


def train(name, args, seed, fold=None):
    """Trains the model of this name, saves its weights after the best epoch and prints what they score.

    The validation images choose the epoch, lower the learning rate and stop the training; the test images
    are read once, when all that is decided. With a fold, 1 to `args.folds`, that fold is for validation.

    Returns:
        The saved weights' accuracies on the validation and on the test images, fractions; the logits of
        the test images, float32 (N, 10), and their labels, int64 (N,), both on the CPU.
    """
    started = time.perf_counter()
    suffix = f"_fold{fold}" if fold else f"_seed{seed}" if args.runs else ""
    last_path, best_path = (args.output_dir / f"{kind}_{name}{suffix}.pth" for kind in ("last", "best"))
    checkpoint.make_way(last_path, best_path)
    folds = (fold, args.folds) if fold else None
    options = {"device": args.device, "data_dir": args.data_dir, "upstrokes": args.augment}
    loaders = get_loaders(args.batch_size, seed=seed, fold=folds, **options)
    state = start(name, args, seed, fold, loaders)
    try:
        fit(state, loaders, args.epochs or RECIPES[name].epochs, args, last_path, best_path)
        best_epoch = state.best_epoch()
        state.average.load_state_dict(state.best)
        logits, labels = (tensor.cpu() for tensor in predict(state.average, loaders[2]))
        print(f"Test Accuracy: {accuracy(logits, labels):.2%} (epoch {best_epoch}, {best_path.name})")
        if args.plot:
            path = args.plot / f"curves_{name}{suffix}.png"
            print(f"See {plots.curves(state.history, best_epoch, path)}")
        print(f"Time: {time.perf_counter() - started:.0f} s")
    except process.Stopped as stopped:
        stopped.saved = state.saved or stopped.saved
        raise
    return state.history[best_epoch - 1]["validation_accuracy"], accuracy(logits, labels), logits, labels


def train_many(name, args):
    """Trains the `args.runs` or `args.folds` of a model; prints how they vary and what they score together.

    Under torchrun each worker trains its share, and the first one prints.
    """
    if args.folds:
        runs = {f"fold {fold}": (args.seed, fold) for fold in range(1, args.folds + 1)}
    else:
        runs = {f"seed {seed}": (seed,) for seed in range(args.seed, args.seed + args.runs)}
    mine = list(runs)[process.RANK :: process.WORLD_SIZE]
    shares = process.gather({run: train(name, args, *runs[run]) for run in mine})
    results = {run: shares[index % process.WORLD_SIZE][run] for index, run in enumerate(runs)}
    print_runs(name, results)


def parse_args(arguments=None):
    """Parses these arguments, or the command line's; prints usage and exits with status 2 on a mistake."""
    rates = ", ".join(f"{name} {recipe.lr['adam']:g}" for name, recipe in RECIPES.items())
    epochs = ", ".join(f"{name} {recipe.epochs}" for name, recipe in RECIPES.items())

    parser = argparse.ArgumentParser(description="Train a tiny MNIST classifier and report how good it is.")
    add = parser.add_argument
    add("--model", choices=[*RECIPES, "all"], default="Model_3", help="default: %(default)s")
    add("--epochs", type=int, metavar="N", help=f"default: {epochs}")
    add("--batch-size", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="default: %(default)s")
    add("--lr", type=float, metavar="RATE", help=f"at the start; adam's default: {rates}")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="deform training images")
    add("--seed", type=int, default=0, metavar="N", help="of split, weights, order; default: %(default)s")
    add("--device", type=flags.device, default=flags.default_device(), help="default: %(default)s")
    add("--early-stopping", type=int, metavar="N", help="stop N epochs after the best; default: off")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--runs", type=int, metavar="N", help="train with N seeds, from --seed")
    many.add_argument("--folds", type=int, metavar="K", help="cross-validate with K folds")
    add("--resume", action="store_true", help="go on where last_<model>.pth in the output folder ends")
    add("--plot", type=Path, metavar="DIR", help="for a picture of loss and accuracy; needs matplotlib")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="has MNIST/raw; default: %(default)s")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="for the models; default: this one")
    args = parser.parse_args(arguments)
    ranges = {"epochs": (1, 10**6), "batch_size": (1, 10**9), "lr": (1e-12, 1e38), "seed": (0, 2**62)}
    ranges |= {"early_stopping": (1, 10**6), "runs": (2, 1_000), "folds": (2, 1_000)}
    flags.check_ranges(parser, args, ranges)
    if process.WORLD_SIZE > 1 and not (args.runs or args.folds):  # a batch is too little work to share
        parser.error("several workers need --runs or --folds: they do not share one run")
    return args


def main():
    args = parse_args()
    errors = DataError, checkpoint.CheckpointError, plots.PlotError, FloatingPointError
    with process.stopped_by_signals(), process.sentences_for(*errors), process.printed_lines():
        process.check_writable(args.output_dir)
        if args.plot:
            plots.check_matplotlib()
            process.check_writable(args.plot)
        args.device = process.own_device(args.device)
        with process.joined_workers(), process.locked(args.output_dir):
            process.gather()  # nobody begins before the folder is locked
            for name in RECIPES if args.model == "all" else [args.model]:
                if args.runs or args.folds:
                    train_many(name, args)
                else:
                    train(name, args, args.seed)


if __name__ == "__main__":
    main()
