"""Images of digits that are hard to separate from their background: which of them are read.

python tests/measure/handwriting.py [CHECKPOINT]

Prints a table by kind: how many images are read as the digit that was drawn, as another one, or as empty.
"""

import argparse
import itertools
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
from support import checkpoint  # noqa: E402
from support.digit_image import ImageError, read_digit  # noqa: E402

THREE = [
    [
        (115, 110),
        (150, 95),
        (180, 115),
        (170, 145),
        (140, 150),
        (170, 155),
        (190, 185),
        (160, 210),
        (112, 195),
    ]
]
NINE = [[(50, 20), (35, 18), (28, 32), (40, 42), (55, 30), (50, 20), (55, 50), (48, 80), (22, 74)]]
FOUR = [[(8, 4), (6, 14), (18, 14)], [(17, 3), (16, 25)]]
SEVEN = [[(130, 80), (260, 80), (190, 230)]]
ONE = [[(57, 60), (62, 240)]]


def draw(size, strokes, width, paper=255, ink=0):
    """Returns strokes, each a list of points, with round ends on paper, in mode "L"."""
    image = Image.new("L", (4 * size[0], 4 * size[1]), paper)
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [(4 * x, 4 * y) for x, y in stroke]
        pen.line(points, fill=ink, width=4 * width, joint="curve")
        for x, y in points:
            pen.ellipse([x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width], fill=ink)
    return image.resize(size, Image.Resampling.LANCZOS)


def box_of(image, margin=0):
    """Returns the bounding box of dark pixels, with a margin inside the image."""
    left, top, right, bottom = image.point(lambda value: 255 * (value < 128)).getbbox()
    return (
        max(0, left - margin),
        max(0, top - margin),
        min(image.width, right + margin),
        min(image.height, bottom + margin),
    )


def noisy(image, sigma, seed=0):
    generator = random.Random(seed)
    values = [min(255, max(0, round(value + generator.gauss(0, sigma)))) for value in image.tobytes()]
    return Image.frombytes("L", image.size, bytes(values))


def thick_rings():
    for width, size in itertools.product((40, 50, 60, 65, 70, 75, 80), (28, 56, 140, 280)):
        image = Image.new("L", (280, 280), 255)
        ImageDraw.Draw(image).ellipse((35, 15, 255, 255), outline=10, width=width)
        yield image.resize((size, size), Image.Resampling.LANCZOS), 0


def thick_tight_crops():
    for width, margin in itertools.product((15, 20, 25, 30, 35), (0, 2, 5, 10)):
        image = draw((300, 300), THREE, width)
        yield image.crop(box_of(image, margin)), 3


def strips():
    for margin, ends in itertools.product((0, 1, 2, 4, 8, 16), (True, False)):
        image = draw((120, 300), ONE, 20)
        left, top, right, bottom = box_of(image, margin)
        yield image.crop((left, top if ends else 0, right, bottom if ends else 300)), 1


def soft_pens():
    for blur, noise, inks in itertools.product(
        (2, 4, 5, 6), (0, 1.5, 3), ((165, 115), (200, 120), (180, 90))
    ):
        image = draw((75, 93), NINE, 7, *inks).filter(ImageFilter.GaussianBlur(blur))
        yield noisy(image, noise), 9


def faint_pens():
    for ink, size in itertools.product((200, 230, 240, 245, 247, 249), (1, 4)):
        strokes = [[(size * x, size * y) for x, y in stroke] for stroke in FOUR]
        yield draw((28 * size, 28 * size), strokes, size, 255, ink), 4


def hard_shadows():
    for shade, ink, flip in itertools.product((110, 130, 150, 175, 200), (20, 60), (False, True)):
        shadow = Image.new("L", (400, 300), 215)
        ImageDraw.Draw(shadow).polygon([(0, 0), (400, 0), (400, 90), (0, 200)], fill=shade)
        shadow = shadow.filter(ImageFilter.GaussianBlur(3))
        shadow = shadow.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if flip else shadow
        mask = draw((400, 300), SEVEN, 14, 0, 255)
        shadow.paste(ink, mask=mask)
        yield shadow, 7


def frames():
    for width, inset, shade in itertools.product((1, 3, 6), (0, 5), (0, 120)):
        image = draw((280, 280), [[(x - 30, y - 20) for x, y in SEVEN[0]]], 18)
        ImageDraw.Draw(image).rectangle((inset, inset, 279 - inset, 279 - inset), outline=shade, width=width)
        yield image, 7


def ruled_paper():
    blues, reds = (
        ((150, 180, 225), (90, 110, 160), (40, 40, 60)),
        ((230, 120, 120), (200, 60, 60), (120, 30, 30)),
    )
    for step, grid, pen, shade in itertools.product((30, 45, 60), (False, True), (8, 12), (0, 1, 2)):
        image = Image.new("RGB", (400, 400), (252, 250, 245))
        page = ImageDraw.Draw(image)
        for place in range(step // 2, 400, step):
            page.line([(0, place), (400, place)], fill=blues[shade], width=2)
            if grid:
                page.line([(place, 0), (place, 400)], fill=blues[shade], width=2)
        if not grid:
            page.line([(70, 0), (70, 400)], fill=reds[shade], width=2)
        mask = draw((400, 400), [[(x + 20, y + 50) for x, y in stroke] for stroke in SEVEN], pen, 0, 255)
        image.paste((30, 30, 60), mask=mask)
        yield image, 7


def dotted_paper():
    for step, size in itertools.product((20, 40), (1, 2)):
        image = draw((400, 400), SEVEN, 14)
        page = ImageDraw.Draw(image)
        for x, y in itertools.product(range(step, 400, step), repeat=2):
            page.ellipse((x - size, y - size, x + size, y + size), fill=150)
        yield image, 7


def wide_strips():
    for x, width in itertools.product((40, 2000, 5900), (3000, 6000)):
        strokes = [[(min(x, width - 40) + 6, 8), (min(x, width - 40) + 26, 8), (min(x, width - 40) + 15, 34)]]
        yield draw((width, 40), strokes, 4), 7


def closed_fours():
    for length in range(0, 21, 5):
        yield draw((200, 300), [[(125, 40), (45, 120), (145 + length, 122)], [(125, 40), (135, 265)]], 8), 4


def thin_twos():
    stroke = [
        (110, 100),
        (95, 60),
        (100, 25),
        (135, 15),
        (185, 30),
        (195, 90),
        (165, 170),
        (115, 220),
        (60, 228),
    ]
    yield draw((300, 300), [stroke, [(60, 228), (150, 221), (255, 222), (265, 226)]], 8), 2


KINDS = [thick_rings, thick_tight_crops, strips, soft_pens, faint_pens, hard_shadows, frames, ruled_paper]
KINDS += [dotted_paper, wide_strips, closed_fours, thin_twos]


@torch.no_grad()
def count(model, images):
    """Returns how many of these images, pairs with a digit, are read, misread and empty."""
    counts = [0, 0, 0]
    for image, digit in images:
        try:
            prediction = int(model(datafile.normalize(read_digit(image)[None])).argmax())
        except ImageError:
            counts[2] += 1
            continue
        counts[prediction != digit] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="models/weights/Model_3.pth")
    model = checkpoint.load(parser.parse_args().checkpoint)
    print(f"{'kind':20}{'read':>6}{'other':>7}{'empty':>7}")
    for kind in KINDS:
        print("{:20}{:6}{:7}{:7}".format(kind.__name__.replace("_", " "), *count(model, kind())))


if __name__ == "__main__":
    main()
