"""Say how good saved models are, each and together, or what they read in pictures of your own digits.

    python evaluate.py best_Model_3.pth                              # on the test images
    python evaluate.py best_Model_*.pth --plot pictures              # and as an ensemble; with pictures
    python evaluate.py best_Model_3.pth --images seven.png photos/   # one digit a picture
    python evaluate.py best_Model_3.pth --draw                       # on a page, with a mouse or a finger

Several models, of one class or of several, vote by the mean of their softmax outputs.
"""

from support import startup  # noqa: F401  # isort: skip  # before PyTorch is imported

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from datafile import DATA_DIR, DataError, get_loaders, normalize
from support import checkpoint, flags, page, plots, process
from support.drawings import SentDrawing, read_drawing, read_drawings
from support.metrics import accuracy, predict, vote


def print_scores(title, probabilities, labels):
    """Prints the accuracy, the number of wrong images and each digit's recall."""
    right = probabilities.argmax(1) == labels
    print(f"{title}\nTest Accuracy: {accuracy(probabilities, labels):.2%} ({(~right).sum()} images wrong)")
    recalls = [f"{digit}: {right[labels == digit].float().mean():.2%}" for digit in range(10)]
    print("Recall of each digit: " + ", ".join(recalls))


@torch.no_grad()
def print_speed(model, loader):
    """Prints the time that one image takes alone, a median of 100, and how many a second go in batches."""

    def seconds(function, *arguments):
        started = time.perf_counter()
        function(*arguments)[0].cpu()  # waits for the device
        return time.perf_counter() - started

    image = loader.dataset.tensors[0][:1]
    latency = statistics.median(seconds(model, image) for _ in range(100))
    throughput = len(loader.dataset) / statistics.median(seconds(predict, model, loader) for _ in range(3))
    print(f"Latency: {1000 * latency:.2f} ms an image; throughput: {throughput:,.0f} images/s\n")


def evaluate(models, args):
    """Prints what the models of `args.checkpoints` score on the test images, each and together."""
    loader = get_loaders(device=args.device, data_dir=args.data_dir)[2]
    images, labels = (tensor.cpu() for tensor in loader.dataset.tensors)
    probabilities = []
    for path, model in zip(args.checkpoints, models):
        probabilities.append(predict(model, loader)[0].cpu().softmax(1))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print_scores(f"{path}: {type(model).__name__}, {parameters:,} parameters", probabilities[-1], labels)
        print_speed(model, loader)
    together = torch.stack(probabilities).mean(0)
    if len(models) > 1:
        print_scores(f"Ensemble of these {len(models)}", together, labels)
    if args.plot:
        for path in plots.evaluation(models, images, together, labels, args.plot):
            print(f"See {path}")


def answer_drawings(models, args):
    """Serves a page to draw on, and says what the models see in each drawing."""

    def read(content):
        digit = read_drawing(SentDrawing(content))
        probabilities = vote(models, normalize(digit[None].to(args.device)))[0]
        return {"probabilities": probabilities.tolist(), "image": digit.flatten().tolist()}

    page.serve(read)


def predict_drawings(models, args):
    """Prints which digit models see in each picture, plots 64 of them; returns whether all could be read."""
    titles, digits, failed = [], [], False
    for path, digit in read_drawings(args.images):
        if isinstance(digit, Exception):
            process.warn(f"evaluate.py: error: {digit}")
            failed = True
            continue
        probabilities = vote(models, normalize(digit[None].to(args.device)))[0]
        (first, second), (guess, other) = (top.tolist() for top in probabilities.topk(2))
        print(f"{path}: {guess} ({first:.1%}), else {other} ({second:.1%})")
        titles.append(f"{guess} ({first:.0%})")
        digits.append(digit)
    if args.plot and digits:
        print(f"See {plots.grid(digits[:64], args.plot / 'seen.png', titles)}")
    return not failed


def parse_args(arguments=None):
    """Parses these arguments, or the command line's; prints usage and exits with status 2 on a mistake."""
    parser = argparse.ArgumentParser(description="Say how good models are, or what they read in pictures.")
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a file like best_Model_3.pth")
    add("--model", choices=checkpoint.model_classes(), help="where a file's weights fit several models")
    add("--images", type=Path, nargs="+", metavar="PATH", help="pictures of a digit, or folders of them")
    add("--draw", action="store_true", help="serve a page to draw a digit on")
    add("--plot", type=Path, metavar="DIR", help="for pictures of what the models see; needs matplotlib")
    add("--device", type=flags.device, default=flags.default_device(), help="default: %(default)s")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="has MNIST/raw; default: %(default)s")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    errors = process.sentences_for(DataError, checkpoint.CheckpointError, plots.PlotError)
    with errors, process.printed_lines():
        if args.plot:
            plots.check_matplotlib()
            process.check_writable(args.plot)
        args.device = process.own_device(args.device)
        models = [checkpoint.load(path, args.model).to(args.device) for path in args.checkpoints]
        if args.draw:
            answer_drawings(models, args)
        elif not args.images:
            evaluate(models, args)
        elif not predict_drawings(models, args):
            sys.exit(1)


if __name__ == "__main__":
    main()
