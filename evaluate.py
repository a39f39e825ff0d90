"""Evaluate saved models on the test set, or classify images of your own digits.

    python evaluate.py                                       # the trained Model_3 in models/weights
    python evaluate.py best_Model_*.pth --plot pictures      # several models and their ensemble, with plots
    python evaluate.py --images seven.png photos/            # one digit per image
    python evaluate.py best_Model_3.pth --draw               # draw digits in the browser

An ensemble predicts the mean of its models' softmax outputs.
"""

from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from datafile import DATA_DIR, get_test_loader, normalize
from models import MODELS
from support import checkpoint, devices, exits, files, plots
from support.flags import path_type
from support.handwriting import ImageError, page
from support.handwriting.reading import find_images, read_digit_and_warning
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
    loader, data = get_test_loader(args.device, args.data_dir or DATA_DIR)
    print(f"{data}\n")
    logits = []
    for path, model in zip(args.checkpoints, models):
        try:
            outputs, labels = predict(model, loader)
        except FloatingPointError as error:
            raise exits.RunError(f"{path}: {error}") from error
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
        plots.save_evaluation(images, probabilities, labels, args.plot)


@torch.no_grad()
def classify(models, digit, device):
    """Returns the ensemble's probabilities, float32 (10,) on the CPU, for an image, uint8 (28, 28).

    Raises RunError if they are not finite.
    """
    images = normalize(digit[None].to(device))
    probabilities = ensemble_probabilities(model(images) for model in models)[0].cpu()
    if not probabilities.isfinite().all():
        raise exits.RunError("the model's logits are not finite")
    return probabilities


def serve_page(models, args):
    """Serves a drawing page and classifies what is drawn on it."""

    def classify_drawing(image):
        digit, warning = read_digit_and_warning(image)
        probabilities = classify(models, digit, args.device).tolist()
        return {"probabilities": probabilities, "image": digit.flatten().tolist(), "warning": warning}

    page.serve(classify_drawing)


def classify_images(models, args):
    """Classifies image files and plots the first 64. Returns False if a file could not be read."""
    images, skipped, failed = find_images(args.images)
    for error in failed:
        exits.warn(f"evaluate.py: error: {error}")
    if skipped:
        advice = " (convert HEIC to JPEG)" if any(path.suffix.lower() == ".heic" for path in skipped) else ""
        exits.warn(f"Skipped files{advice}: {', '.join(path.name for path in skipped)}")
    if not images:
        raise exits.RunError(f"no images in {', '.join(map(str, args.images))}")
    titles = []
    digits = []
    for path in images:
        try:
            digit, warning = read_digit_and_warning(path)
        except (ImageError, OSError) as error:
            exits.warn(f"evaluate.py: error: {error}")
            failed.append(error)
            continue
        values, indices = classify(models, digit, args.device).topk(2)
        answer = f"{indices[0]} ({values[0]:.1%}), then {indices[1]} ({values[1]:.1%})"
        print(f"{path}: {answer}; {warning}" if warning else f"{path}: {answer}")
        titles.append(f"{indices[0]} ({values[0]:.0%})")
        digits.append(digit)
    if args.plot and digits:
        if len(digits) > 64:
            print(f"seen.png shows the first 64 of {len(digits)} images")
        plots.save(args.plot / "seen.png", plots.grid, digits[:64], titles)
    return not failed


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description="Evaluate saved models, or classify your own digits.")
    default = "default: models/weights/Model_3.pth"
    parser.add_argument("checkpoints", type=path_type, nargs="*", metavar="CHECKPOINT", help=default)
    parser.add_argument("--model", choices=MODELS, help="model class, if the weights fit several")
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument("--images", type=path_type, nargs="+", metavar="PATH", help="files or directories")
    inputs.add_argument("--draw", action="store_true", help="serve a page to draw digits on")
    parser.add_argument("--plot", type=path_type, metavar="DIR", help="directory (requires matplotlib)")
    parser.add_argument("--device", type=devices.parse_device, help="default: cuda if available, else cpu")
    parser.add_argument("--data-dir", type=path_type, metavar="DIR", help="directory of the data set")
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
    with exits.exit_on_error():
        exits.line_buffer_stdout()
        if args.plot:
            plots.prepare(args.plot)
        args.device = devices.select_device(args.device)
        args.checkpoints = files.expand(args.checkpoints or [WEIGHTS])
        models = [checkpoint.load(path, args.model).to(args.device) for path in args.checkpoints]
        if args.draw:
            serve_page(models, args)
        elif not args.images:
            evaluate(models, args)
        elif not classify_images(models, args):
            sys.exit(1)


if __name__ == "__main__":
    main()
