"""Train a tiny MNIST classifier and report how good it is.

    python train.py                                  # Model_3, the advanced one
    python train.py --model Model_1 --seed 1
    python train.py --model all --output-dir runs
    python train.py --resume                         # go on where an interrupted run was
    python train.py --runs 10                        # seeds 0 to 9: mean, spread and ensemble
    torchrun --nproc-per-node=2 train.py --folds 5   # cross-validation, two folds at a time

Read from top to bottom: the recipes, one epoch, the loop, many runs, the interruptions, the flags.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import math
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before the imports that take a second: Ctrl-C there ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import distributed, optim
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchsummary import summary
from tqdm import tqdm

import models
from datafile import DATA_DIR, augment, get_loaders
from evaluate import accuracy, predict
from models import checkpoint, pictures
from models.flags import default_device, device, number

# Set by torchrun, where there is more than one worker.
RANK, WORLD_SIZE, LOCAL_RANK = (
    int(os.environ.get(name, default))
    for name, default in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)]
)


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
    "adam": functools.partial(optim.Adam, fused=True),
    "adamw": functools.partial(optim.AdamW, fused=True),
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "sgd": functools.partial(optim.SGD, momentum=0.9, nesterov=True, fused=True),
}


def train_epoch(model, average, loader, optimizer, epoch, augmented=True):
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
    with tqdm(
        loader, f"Epoch {epoch}", leave=False, disable=RANK > 0 or None
    ) as bar:  # None: not without a terminal
        for step, (images, labels) in enumerate(bar):
            logits = model(augment(images) if augmented else images)
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


def keep_memory():
    """Has glibc, where there is one, keep the memory of a step for the next one.

    It would give it back to the system, which clears it before it is used again: up to half of a step
    on a CPU. It keeps what is smaller than the largest tensor, up to 32 MiB, that was freed before.
    """
    torch.empty(33_000_000, dtype=torch.uint8)


def train(name, args, seed, fold=None):
    """Trains the model of this name, saves its weights after the best epoch and prints what they score.

    The validation images choose the epoch, lower the learning rate and stop the training. The test
    images are looked at once, when all that is decided. With a fold, a number from 1, the validation
    images are that part of the training images out of `args.folds`.

    Returns:
        The saved weights' accuracies on the validation and on the test images, fractions, and the
        logits of the test images, float32 (10,000, 10).
    """
    started = time.perf_counter()
    recipe = RECIPES[name]
    epochs, lr = args.epochs or recipe.epochs, args.lr or recipe.lr[args.optimizer]
    part = f"_fold{fold}" if fold else f"_seed{seed}" if args.runs else ""
    best_path, last_path = (args.output_dir / f"{kind}_{name}{part}.pth" for kind in ("best", "last"))
    for path in best_path, last_path:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: move it away, this run saves a file there")
        checkpoint.temporary_name(path).unlink(missing_ok=True)

    folds = (fold, args.folds) if fold else None
    loaders = get_loaders(args.batch_size, seed=seed, device=args.device, data_dir=args.data_dir, fold=folds)
    train_loader, validation_loader, test_loader = loaders
    torch.manual_seed(seed)
    random.seed(seed)  # nothing here draws from it, but its state is saved
    model = getattr(models, name)()
    print(f"{name} on {args.device}, seed {seed}" + (f", fold {fold} of {args.folds}" if fold else ""))
    summary(copy.deepcopy(model).eval(), (1, 28, 28), device="cpu")
    sizes = [f"{len(loader.dataset):,}" for loader in loaders]
    print("Images: {} for training, {} for validation, {} for the test\n".format(*sizes))

    model.to(args.device)
    average = copy.deepcopy(model)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=lr)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3)
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    flags = {"model": name, "seed": seed, "folds": f"{fold} of {args.folds}" if fold else "none"}
    flags |= {"batch-size": args.batch_size, "optimizer": args.optimizer, "lr": lr, "augment": args.augment}
    generator = train_loader.sampler.generator
    # A row an epoch: learning rate, loss and accuracy in training, loss and accuracy on validation images.
    history, best = [], {}

    def best_epoch():
        accuracies = [row[-1] for row in history]
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
        expected = state() | {
            "best": model.state_dict(),
            "optimizer": checkpoint.state_after_a_step(optimizer),
        }
        saved = checkpoint.read_state(last_path, expected)
        history, best = saved["history"], saved["best"]
        checkpoint.restore(saved, parts, generator, args.device, last_path)
        checkpoint.save(best, best_path)  # a run that was killed between its two files has left an older one
        args.saved = f"epoch {len(history)} is saved in {last_path}"
        print(f"{last_path} is {'finished' if finished() else 'resumed'} after epoch {len(history)}")
    elif args.resume:
        print(f"There is no {last_path} to resume: starting from the beginning")

    keep_memory()
    while not finished():
        epoch = len(history) + 1
        loss, training_accuracy = train_epoch(model, average, train_loader, optimizer, epoch, args.augment)
        logits, labels = predict(average, validation_loader)
        validation_loss, validation_accuracy = cross_entropy(logits, labels).item(), accuracy(logits, labels)
        print(f"Epoch: {epoch}/{epochs}")
        print(f"Training Loss: {loss:.3f}")
        print(f"Training Accuracy: {training_accuracy:.2%}")
        print(f"Validation Accuracy: {validation_accuracy:.2%}")
        print("-" * 50)

        lr = optimizer.param_groups[0]["lr"]
        history.append((lr, loss, training_accuracy, validation_loss, validation_accuracy))
        scheduler.step(validation_accuracy)
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
    logits, labels = predict(average, test_loader)
    print(f"Test Accuracy: {accuracy(logits, labels):.2%} (epoch {best_epoch()}, {best_path.name})")
    if args.plot:
        print(f"See {pictures.curves(history, best_epoch(), args.plot / f'curves_{name}{part}.png')}")
    print(f"Time: {time.perf_counter() - started:.0f} s")
    return history[best_epoch() - 1][-1], accuracy(logits, labels), logits.cpu(), labels.cpu()


def train_many(name, args):
    """Trains the `args.runs` or `args.folds` of a model; prints how they vary and what they score together.

    Under torchrun each worker trains its share, and the first one prints.
    """
    if args.folds:
        runs = {f"fold {fold}": (args.seed, fold) for fold in range(1, args.folds + 1)}
    else:
        runs = {f"seed {seed}": (seed,) for seed in range(args.seed, args.seed + args.runs)}
    shares = [None] * WORLD_SIZE
    shares[RANK] = {run: train(name, args, *runs[run]) for run in list(runs)[RANK::WORLD_SIZE]}
    if WORLD_SIZE > 1:
        distributed.all_gather_object(shares, shares[RANK])
    results = {run: shares[index % WORLD_SIZE][run] for index, run in enumerate(runs)}

    validations, tests, logits, labels = zip(*results.values(), strict=True)
    print(f"\n{name:12}{'Validation':18}Test")
    for run, validation, test in zip(results, validations, tests, strict=True):
        print(f"{run:12}{validation:<18.2%}{test:.2%}")
    spreads = [f"{statistics.mean(x):.2%} ± {statistics.stdev(x):.2%}" for x in (validations, tests)]
    print(f"{'mean ± sd':12}{spreads[0]:18}{spreads[1]}")
    print(f"{'lowest':12}{min(validations):<18.2%}{min(tests):.2%}")
    print(f"{'ensemble':30}{accuracy(torch.stack(logits).softmax(2).mean(0), labels[0]):.2%}")


def parse_args(arguments=None):
    """Parses these arguments, or the command line's; prints usage and exits with status 2 on a mistake."""
    rates = ", ".join(f"{name} {recipe.lr['adam']:g}" for name, recipe in RECIPES.items())
    epochs = ", ".join(f"{name} {recipe.epochs}" for name, recipe in RECIPES.items())
    positive = number(int, 1)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=[*RECIPES, "all"], default="Model_3", help="default: %(default)s")
    add("--epochs", type=positive, metavar="N", help=f"default: {epochs}")
    add("--batch-size", type=positive, default=128, metavar="N", help="default: %(default)s")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="default: %(default)s")
    add("--lr", type=number(float, 1e-12), metavar="RATE", help=f"at the start; adam's default: {rates}")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="deform training images")
    add("--seed", type=number(int, 0, 2**62), default=0, metavar="N", help="of split, weights, order")
    add("--device", type=device, default=default_device(), help="default: cuda, else mps, else cpu")
    add("--early-stopping", type=positive, metavar="N", help="stop N epochs after the best; default: off")
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--runs", type=number(int, 2, 1_000), metavar="N", help="train with N seeds, from --seed"
    )
    many.add_argument("--folds", type=number(int, 2, 1_000), metavar="K", help="cross-validate with K folds")
    add("--resume", action="store_true", help="go on where last_<model>.pth in the output folder ends")
    add("--plot", type=Path, metavar="DIR", help="for a picture of loss and accuracy; needs matplotlib")
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
        command = command if WORLD_SIZE == 1 else "the same command and --resume"
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
    if WORLD_SIZE > 1:
        if not (args.runs or args.folds):  # a batch of 128 images is too little work to share
            sys.exit("train.py: error: several workers need --runs or --folds: they do not share one run")
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        if args.device.type == "cuda" and args.device.index is None:
            args.device = torch.device("cuda", LOCAL_RANK % torch.cuda.device_count())
    if RANK:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        for folder in filter(None, (args.output_dir, args.plot)):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # better found out now than after an epoch
                pass
        if args.plot:
            pictures.check_matplotlib()
        if LOCAL_RANK == 0:
            checkpoint.lock(args.output_dir)
        if WORLD_SIZE > 1:
            distributed.barrier()  # nobody begins before the folder is locked
        for name in names:
            if args.runs or args.folds:
                train_many(name, args)
            else:
                train(name, args, args.seed)
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        sys.exit(f"train.py: error: {error}")
    except RuntimeError as error:
        if "gloo" in str(error):
            sys.exit("train.py: error: another worker has stopped; go on with the same command and --resume")
        if "memory" not in str(error):
            raise
        sys.exit(f"train.py: error: {args.device} has too little memory: try a smaller --batch-size")


if __name__ == "__main__":
    main()
