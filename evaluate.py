"""Say how good saved models are, each and together, or what they read in pictures of your own digits.

    python evaluate.py best_Model_3.pth                              # on the test images
    python evaluate.py best_Model_*.pth --plot pictures              # and as an ensemble; with pictures
    python evaluate.py best_Model_3.pth --images seven.png photos/   # one digit a picture

Several models, of one class or of several, vote by the mean of their softmax outputs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from datafile import DATA_DIR, get_loaders, normalize, read_drawing
from models import checkpoint, pictures
from models.flags import default_device, device


@torch.no_grad()
def predict(model, loader):
    """Returns the logits, float32 (N, 10), of all images of a loader that goes in order, and their labels."""
    model.eval()
    return torch.cat([model(images) for images, _ in loader]), loader.dataset.tensors[1]


def accuracy(logits, labels):
    """Returns the fraction of rows of (N, 10) whose largest value stands at the label, int64 (N,)."""
    return float((logits.argmax(1) == labels).sum() / len(labels))


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
        float(function(*arguments)[0].sum())  # waits for the device
        return time.perf_counter() - started

    image = loader.dataset.tensors[0][:1]
    latency = statistics.median(seconds(model, image) for _ in range(110))
    throughput = len(loader.dataset) / statistics.median(seconds(predict, model, loader) for _ in range(3))
    print(f"Latency: {1000 * latency:.2f} ms an image; throughput: {throughput:,.0f} images/s\n")


def evaluate(paths, args):
    """Prints what the models in these files score on the test images, each and together."""
    loader = get_loaders(device=args.device, data_dir=args.data_dir)[2]
    images, labels = loader.dataset.tensors
    models, probabilities = [], []
    for path in paths:
        model = checkpoint.load(path).to(args.device)
        models.append(model)
        probabilities.append(predict(model, loader)[0].softmax(1))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        title = f"{path}: {type(model).__name__}, {parameters:,} parameters"
        print_scores(title, probabilities[-1], labels)
        print_speed(model, loader)
    together = torch.stack(probabilities).mean(0)
    if len(paths) > 1:
        print_scores(f"Ensemble of these {len(paths)}", together, labels)
    if args.plot:
        for path in pictures.evaluation(models, images, together, labels, args.plot):
            print(f"See {path}")


def read(paths, args):
    """Prints which digit the models see in each picture, and with --plot draws what the first 64 became.

    Returns:
        How many pictures could not be read.
    """
    models = [checkpoint.load(path).to(args.device) for path in paths]
    files = []
    for path in args.images:
        files += sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    rows, seen = [], []
    for path in files:
        try:
            digit = read_drawing(path)
        except (OSError, ValueError) as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            continue
        image = normalize(digit[None].to(args.device))
        with torch.no_grad():
            probabilities = torch.stack([model(image)[0].softmax(0) for model in models]).mean(0)
        (first, second, *_), (guess, other, *_) = (part.tolist() for part in probabilities.topk(2))
        print(f"{path}: {guess} ({first:.1%}), else {other} ({second:.1%})")
        rows.append(f"{guess} ({first:.0%})")
        seen.append(digit)
    if args.plot and seen:
        print(f"See {pictures.grid(torch.stack(seen[:64]), rows, args.plot / 'seen.png')}")
    return len(files) - len(seen)


def parse_args(arguments=None):
    """Parses these arguments, or the command line's; prints usage and exits with status 2 on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="a file like best_Model_3.pth")
    add(
        "--images",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="pictures of one digit each, or folders of them",
    )
    add("--plot", type=Path, metavar="DIR", help="for pictures of what the models see; needs matplotlib")
    add("--device", type=device, default=default_device(), help="default: cuda, else mps, else cpu")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="has MNIST/raw; default: %(default)s")
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    try:
        if args.plot:
            pictures.check_matplotlib()
            args.plot.mkdir(parents=True, exist_ok=True)
        if args.images:
            sys.exit(1 if read(args.checkpoints, args) else 0)
        evaluate(args.checkpoints, args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"evaluate.py: error: {error}")


if __name__ == "__main__":
    main()
