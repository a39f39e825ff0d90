"""Reads digits of USPS in several sizes and on paper, and digits of MNIST as if photographed.

    python tests/measure/photos.py [CHECKPOINT]

Compared with USPS's images only resized to 28 x 28, and with MNIST's as they are.
Takes some minutes.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import pad
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from usps import read_usps  # noqa: E402

import datafile  # noqa: E402
from support import checkpoint  # noqa: E402
from support.handwriting.reading import ImageError, read_digit  # noqa: E402
from support.metrics import accuracy, predict  # noqa: E402


def photo(ink, generator, margins):
    """Returns a photo of ink (H, W), from 0 to 1, on paper with noise, the light falling off to one side."""
    ink = pad(ink, margins)
    height, width = ink.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = generator.uniform(0, 2 * math.pi)
    light = 0.75 + 0.2 * (x * math.cos(angle) + y * math.sin(angle)) - 0.05 * (x * x + y * y)
    gray = (220 - 160 * ink) * light + 3 * torch.randn(height, width)
    return to_pil_image(gray.clamp(0, 255).byte())


def enlarged(image, side):
    """Returns the ink of an image, uint8 (H, W), enlarged to a square: float32 from 0 to 1."""
    picture = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return pil_to_tensor(picture)[0] / 255


def score(model, pictures, labels):
    """Returns the accuracy of pictures, `PIL.Image`s; one in which nothing is found counts as blank."""
    digits = []
    for picture in pictures:
        try:
            digits.append(read_digit(picture))
        except ImageError:
            digits.append(torch.zeros(28, 28, dtype=torch.uint8))
    return accuracy(*predict(model, datafile.make_loader(torch.stack(digits), labels, "cpu")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="models/weights/Model_3.pth")
    parser.add_argument("--usps", type=Path, default=Path("usps"), help="directory of USPS")
    args = parser.parse_args()
    model = checkpoint.load(args.checkpoint)
    torch.manual_seed(0)
    generator = random.Random(0)
    args.usps.mkdir(exist_ok=True)
    print(f"USPS, training part, resized: {accuracy(*predict(model, read_usps(args.usps, train=True))):.2%}")
    usps = datasets.USPS(args.usps, train=True, download=True)
    labels = torch.tensor(usps.targets)
    for factor in 1, 2, 4, 8:
        size = 16 * factor, 16 * factor
        pictures = (Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in usps.data)
        print(f"read, {size[0]} pixels: {score(model, pictures, labels):.2%}", flush=True)
    pictures = (
        Image.fromarray(255 - image).resize((64, 64), Image.Resampling.BICUBIC) for image in usps.data
    )
    print(f"read, 64 pixels, dark on light: {score(model, pictures, labels):.2%}", flush=True)
    pictures = (photo(enlarged(image, 64), generator, (16, 16, 16, 16)) for image in usps.data)
    print(f"read, photographed: {score(model, pictures, labels):.2%}", flush=True)

    images, labels = datafile.read_split(datafile.find_raw_dir(datafile.DATA_DIR), "train")
    images, labels = images[:3_000], labels[:3_000]
    plain = accuracy(*predict(model, datafile.make_loader(images, labels, "cpu")))
    print(f"MNIST, 3,000 training images: {plain:.2%}")
    margins = [[generator.randint(20, 200) for _ in range(4)] for _ in images]
    pictures = (photo(enlarged(x.numpy(), 200), generator, margin) for x, margin in zip(images, margins))
    print(f"read, photographed: {score(model, pictures, labels):.2%}")


if __name__ == "__main__":
    main()
