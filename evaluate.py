"""Evaluate saved models on the test set, or classify images of your own digits.

    python evaluate.py                                       # the trained Model_3 in models/weights
    python evaluate.py best_Model_*.pth --plot pictures      # several models and their ensemble, with plots
    python evaluate.py --images seven.png photos/            # one digit per image
    python evaluate.py best_Model_3.pth --draw               # draw digits in the browser

An ensemble predicts the mean of its models' softmax outputs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -P and -I, which leave it out
from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import io
import statistics
import time
import warnings

import torch

from datafile import DATA_DIR, get_test_loader, normalize
from models import MODELS
from support import checkpoint, devices, files, flags, page, plots, process
from support.digit_image import ImageError, read_digit_and_remark
from support.metrics import ensemble_probabilities, predict, print_scores

WEIGHTS = Path(__file__).resolve().parent / "models" / "weights" / "Model_3.pth"


@torch.no_grad()
def print_speed(model, loader):
    """Prints single-image latency (median of 100 passes) and batched throughput."""

    def seconds(function, *arguments):
        started = time.perf_counter()
        function(*arguments)[0].cpu()  # synchronizes with the device
        return time.perf_counter() - started

    image = loader.dataset.tensors[0][:1]
    latency = statistics.median(seconds(model, image) for _ in range(100))
    throughput = len(loader.dataset) / statistics.median(seconds(predict, model, loader) for _ in range(3))
    print(f"Latency: {1000 * latency:.2f} ms; throughput: {throughput:,.0f} images/s\n")


def evaluate(models, args):
    """Prints test accuracy for each model and for their ensemble."""
    loader = get_test_loader(args.device, args.data_dir or DATA_DIR)
    logits = []
    for path, model in zip(args.checkpoints, models):
        outputs, labels = predict(model, loader)
        logits.append(outputs)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        title = f"{path}: {type(model).__name__}, {parameters:,} parameters"
        print_scores(title, outputs.softmax(1), labels)
        print_speed(model, loader)
    probabilities = ensemble_probabilities(logits)
    if len(models) > 1:
        print_scores(f"Ensemble of {len(models)} models", probabilities, labels)
    if args.plot:
        images = loader.dataset.tensors[0].cpu()
        for path in plots.evaluation(models, images, probabilities, labels, args.plot):
            print(f"See {path}")


@torch.no_grad()
def classify(models, digit, device):
    """Returns the ensemble's probabilities, float32 (10,) on the CPU, for an image, uint8 (28, 28)."""
    images = normalize(digit[None].to(device))
    return ensemble_probabilities(model(images) for model in models)[0].cpu()


def serve_page(models, args):
    """Serves a drawing page and classifies what is drawn on it."""

    def read(content):
        digit, remark = read_digit_and_remark(io.BytesIO(content))
        probabilities = classify(models, digit, args.device).tolist()
        return {"probabilities": probabilities, "image": digit.flatten().tolist(), "remark": remark}

    page.serve(read)


def classify_images(models, args):
    """Classifies image files and plots the first 64. Returns False if a file could not be read."""
    titles, digits, failed = [], [], False
    images, skipped = files.find_images(args.images)
    if skipped:
        advice = " (convert HEIC to JPEG)" if any(path.suffix.lower() == ".heic" for path in skipped) else ""
        process.warn(f"Skipped files{advice}: {', '.join(path.name for path in skipped)}")
    if not images:
        raise process.RunError(f"no images in {', '.join(map(str, args.images))}")
    for path in images:
        try:
            digit, remark = read_digit_and_remark(path)
        except (ImageError, OSError) as error:
            process.warn(f"evaluate.py: error: {error}")
            failed = True
            continue
        top = classify(models, digit, args.device).topk(2)
        (first, second), (best, other) = top.values.tolist(), top.indices.tolist()
        answer = f"{path}: {best} ({first:.1%}), then {other} ({second:.1%})"
        print(answer + f"; {remark}" * bool(remark))
        titles.append(f"{best} ({first:.0%})")
        digits.append(digit)
    if args.plot and digits:
        print(f"See {plots.grid(digits[:64], args.plot / 'seen.png', titles)}")
    return not failed


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description="Evaluate saved models, or classify your own digits.")
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group()
    help_ = "weight files (default: models/weights/Model_3.pth)"
    add("checkpoints", type=flags.path, nargs="*", default=[WEIGHTS], metavar="CHECKPOINT", help=help_)
    add("--model", choices=MODELS, help="model class, if the weights fit several")
    help_ = "images of one digit each, or directories of them"
    mode.add_argument("--images", type=flags.path, nargs="+", metavar="PATH", help=help_)
    mode.add_argument("--draw", action="store_true", help="serve a page to draw digits on")
    add("--plot", type=flags.path, metavar="DIR", help="directory for plots (requires matplotlib)")
    help_ = "device to run on (default: cuda if available, else cpu)"
    add("--device", type=devices.parse_device, metavar="NAME", help=help_)
    help_ = "directory with MNIST/raw or the four files (default: data, beside this script)"
    add("--data-dir", type=flags.path, metavar="DIR", help=help_)
    args = parser.parse_args(arguments)
    for path in args.images or []:
        if path.suffix == ".pth":
            parser.error(f"{path} is not an image: put checkpoints before --images")
    if args.plot and args.draw:
        parser.error("argument --plot: not allowed with argument --draw")
    if args.data_dir and (args.images or args.draw):
        parser.error("argument --data-dir: not allowed with --images or --draw, which need no data set")
    return args


def main():
    args = parse_args()
    warnings.filterwarnings("ignore", module="PIL")  # about metadata and size
    with process.exit_on_error():
        process.line_buffer_stdout()
        if args.plot:
            plots.prepare(args.plot)
        args.device = devices.select_device(args.device)
        args.checkpoints = files.expand(args.checkpoints)
        models = [checkpoint.load(path, args.model).to(args.device) for path in args.checkpoints]
        if args.draw:
            serve_page(models, args)
        elif not args.images:
            evaluate(models, args)
        elif not classify_images(models, args):
            sys.exit(1)


if __name__ == "__main__":
    main()
