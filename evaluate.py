"""Evaluate saved models on the test set, or classify images of your own digits.

    python evaluate.py                                       # the trained Model_3 in models/weights
    python evaluate.py best_Model_*.pth --plot pictures      # several models and their ensemble, with plots
    python evaluate.py --images seven.png photos/            # one digit per image
    python evaluate.py best_Model_3.pth --draw               # on a page, with a mouse or a finger

An ensemble predicts the mean of its models' softmax outputs.
"""

from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import torch

from datafile import DATA_DIR, DataError, get_test_loader, normalize
from models import MODELS
from support import checkpoint, device, flags, page, plots, process
from support.drawings import DrawingError, examine, find_images
from support.metrics import accuracy, ensemble_probabilities, predict

WEIGHTS = Path(__file__).resolve().parent / "models" / "weights" / "Model_3.pth"


def print_scores(title, probabilities, labels):
    """Prints the accuracy, the number of errors and the recall of each digit in the labels."""
    correct = probabilities.argmax(1) == labels
    print(f"{title}\nTest Accuracy: {accuracy(probabilities, labels):.2%} ({(~correct).sum()} errors)")
    recalls = [f"{digit}: {correct[labels == digit].float().mean():.2%}" for digit in labels.unique()]
    print("Recall: " + ", ".join(recalls))


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
    loader = get_test_loader(args.device, args.data_dir)
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
        digit, remark = examine(io.BytesIO(content))
        probabilities = classify(models, digit, args.device).tolist()
        return {"probabilities": probabilities, "image": digit.flatten().tolist(), "remark": remark}

    page.serve(read)


def classify_images(models, args):
    """Classifies image files and plots the first 64. Returns False if a file could not be read."""
    titles, digits, failed = [], [], False
    images, skipped = find_images(flags.expand(args.images))
    if skipped:
        advice = " (convert HEIC to JPEG)" if any(path.suffix.lower() == ".heic" for path in skipped) else ""
        process.warn(f"Skipped files{advice}: {', '.join(path.name for path in skipped)}")
    for path in images:
        try:
            digit, remark = examine(path)
        except (DrawingError, OSError) as error:
            process.warn(f"evaluate.py: error: {error}")
            failed = True
            continue
        top = classify(models, digit, args.device).topk(2)
        (first, second), (best, other) = top.values.tolist(), top.indices.tolist()
        answer = f"{path}: {best} ({100 * first:.1f} %), then {other} ({100 * second:.1f} %)"
        print(answer + f"; {remark}" * bool(remark))
        titles.append(f"{best} ({100 * first:.0f} %)")
        digits.append(digit)
    if args.plot and digits:
        print(f"See {plots.grid(digits[:64], args.plot / 'seen.png', titles)}")
    return not failed


def parse_args(arguments=None):
    """Parses the command line (or `arguments`, if given)."""
    parser = argparse.ArgumentParser(description="Evaluate saved models, or classify your own digits.")
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group()
    help_ = "files of weights (default: models/weights/Model_3.pth)"
    add("checkpoints", type=flags.path, nargs="*", default=[WEIGHTS], metavar="CHECKPOINT", help=help_)
    add("--model", choices=MODELS, help="model class, if the weights fit several")
    help_ = "images of one digit each, or directories of them"
    mode.add_argument("--images", type=flags.path, nargs="+", metavar="PATH", help=help_)
    mode.add_argument("--draw", action="store_true", help="serve a page to draw digits on")
    add("--plot", type=flags.path, metavar="DIR", help="directory for plots (requires matplotlib)")
    add("--device", type=device.device, help="device to run on (default: cuda if available, else cpu)")
    add("--data-dir", type=flags.path, default=DATA_DIR, metavar="DIR", help="directory with MNIST/raw")
    args = parser.parse_args(arguments)
    for path in args.images or []:
        if path.suffix == ".pth":
            parser.error(f"{path} is not an image: put checkpoints before --images")
    return args


def main():
    args = parse_args()
    errors = DataError, DrawingError, checkpoint.CheckpointError, plots.PlotError
    with process.exit_on_error(*errors):
        process.line_buffer_stdout()
        if args.plot:
            plots.prepare(args.plot)
        args.device = device.select_device(args.device)
        args.checkpoints = flags.expand(args.checkpoints)
        models = [checkpoint.load(path, args.model).to(args.device) for path in args.checkpoints]
        if args.draw:
            serve_page(models, args)
        elif not args.images:
            evaluate(models, args)
        elif not classify_images(models, args):
            sys.exit(1)


if __name__ == "__main__":
    main()
