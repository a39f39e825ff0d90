"""Images of digits that are hard to separate from their background: which of them are read.

python tests/measure/handwriting.py [CHECKPOINT]

Prints a table by kind: how many images are read as the digit that was drawn, as another one with a warning or
without one, or as empty.
"""

import argparse
import functools
import itertools
import math
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
from support import checkpoint  # noqa: E402
from support.handwriting.reading import ImageError, read_digit_and_warning  # noqa: E402

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


def moved(points, amount, generator):
    return [
        (x + generator.uniform(-amount, amount), y + generator.uniform(-amount, amount)) for x, y in points
    ]


def jittered(size, strokes, pen, amount, times=30, scale=1, paper=255, ink=0):
    """Yields images of lines between points that are moved at random by up to `amount` pixels."""
    generator = random.Random(0)
    for _ in range(times):
        image = Image.new("L", tuple(scale * side for side in size), paper)
        for stroke in strokes:
            points = [
                tuple(scale * (value + generator.uniform(-amount, amount)) for value in point)
                for point in stroke
            ]
            ImageDraw.Draw(image).line(points, fill=ink, width=scale * pen, joint="curve")
        yield image


def curve(points, steps=8):
    """Returns the points of a smooth curve through these points (Catmull-Rom)."""
    points = [points[0], *points, points[-1]]
    result = []
    for before, start, end, after in zip(points, points[1:], points[2:], points[3:]):
        for i in range(steps):
            u = i / steps
            result.append(
                tuple(
                    0.5
                    * (
                        2 * q
                        + (r - p) * u
                        + (2 * p - 5 * q + 4 * r - s) * u**2
                        + (3 * q - p - 3 * r + s) * u**3
                    )
                    for p, q, r, s in zip(before, start, end, after)
                )
            )
    return [*result, points[-1]]


NINE_BOWL = [
    (18, 4),
    (16, 2),
    (13, 1),
    (10, 2),
    (7, 4),
    (6, 8),
    (7, 11),
    (10, 14),
    (14, 14),
    (17, 12),
    (18, 10),
]


def straight_stems():
    """Strokes that fill a row or a column of a small image."""
    for strokes, digit in (
        ([NINE_BOWL, [(18, 3), (18, 26)]], 9),
        ([NINE_BOWL, [(18, 1), (18, 27)]], 9),
        ([curve([(6, 9), (10, 3), (17, 5), (17, 12), (8, 23)]), [(1, 24), (27, 24)]], 2),
        ([[(7, 1), (18, 1), (18, 27)]], 7),
        ([[(8, 9), (14, 1), (14, 27)]], 1),
    ):
        for scale in 1, 10:
            yield from ((image, digit) for image in jittered((28, 28), strokes, 1, 0.5, 12, scale))


def hairlines():
    """Pens of a hundredth of the digit's height."""
    points = [(96, 60), (110, 38), (140, 24), (172, 34), (186, 70), (170, 120), (130, 180), (86, 226)]
    generator = random.Random(0)
    for pen, _ in itertools.product((1, 2, 3, 4), range(30)):
        image = Image.new("L", (300, 260), 255)
        ImageDraw.Draw(image).line(
            [*curve(moved(points, 8, generator)), (200, 220)], fill=0, width=pen, joint="curve"
        )
        yield image, 2


def cluttered_photos():
    """Patterned cloth above the paper, a soft shadow below."""
    for seed in range(5):
        generator = random.Random(seed)
        image = Image.new("L", (720, 1600), 198)
        page = ImageDraw.Draw(image)
        for x, y in itertools.product(range(0, 720, 24), range(0, 225, 24)):
            page.rectangle((x, y, x + 23, min(y + 23, 224)), fill=generator.randint(60, 175))
        shade = torch.arange(1600.0)[:, None].sub(1000).div(450).clamp(0, 1)
        shade = 150 * shade * (1 - torch.arange(720.0) / 900).clamp(min=0)
        image = to_pil_image((pil_to_tensor(image)[0] - shade).clamp(min=0).round().byte())
        image = image.filter(ImageFilter.GaussianBlur(4))
        page = ImageDraw.Draw(image)
        for stroke in [(320, 850), (480, 830), (380, 1020)], [(330, 930), (450, 920)]:
            page.line(moved(stroke, 8, generator), fill=130, width=8, joint="curve")
        yield image, 7


def opaque_patches():
    """An opaque patch with a digit in a transparent picture."""
    for paper, ink in (
        ((255, 127, 39), (160, 25, 25)),
        ((255, 255, 255), (0, 0, 0)),
        ((0, 0, 120), (250, 250, 250)),
    ):
        for left, top in (380, 450), (0, 0), (200, 300):
            image = Image.new("RGBA", (864, 885), (0, 0, 0, 0))
            page = ImageDraw.Draw(image)
            page.rectangle((left, top, left + 484, top + 435), fill=(*paper, 255))
            page.ellipse((left + 145, top + 70, left + 355, top + 380), outline=(*ink, 255), width=24)
            yield image, 0


def fainter_strokes():
    """An 8 whose second stroke is fainter than its first."""
    for seed, ink in itertools.product(range(6), (170, 185, 200)):
        generator = random.Random(seed)
        image = Image.new("L", (50, 52), 250)
        page = ImageDraw.Draw(image)
        page.line(
            curve(moved([(32, 12), (25, 8), (18, 13), (20, 20), (30, 29), (32, 38), (25, 44)], 1, generator)),
            30,
            3,
        )
        page.line(
            curve(moved([(25, 44), (17, 40), (18, 32), (27, 24), (33, 17), (32, 12)], 1, generator)), ink, 3
        )
        yield image, 8


def angular_sixes():
    six = [
        (18, 2),
        (13, 3),
        (9, 6),
        (6, 9),
        (5, 13),
        (5, 16),
        (8, 20),
        (15, 20),
        (18, 17),
        (18, 14),
        (15, 10),
        (6, 10),
    ]
    yield from ((image, 6) for image in jittered((28, 28), [six], 3, 0.5))


def ones_with_a_base():
    one = [[(10, 9), (14, 6), (15, 17)], [(8, 20), (22, 15)]]
    yield from ((image, 1) for image in jittered((28, 28), one, 3, 0.5))


def repeated(function, times=30):
    """Returns a generator function that yields `function(generator)` for 30 seeds, under its name."""

    @functools.wraps(function)
    def kind():
        yield from (function(random.Random(seed)) for seed in range(times))

    return kind


DIGITS = {  # strokes in a square of 100 x 100
    1: [[(50, 5), (50, 95)]],
    2: [curve([(20, 25), (40, 5), (70, 15), (65, 45), (15, 92)]), [(15, 92), (85, 90)]],
    4: [[(40, 5), (18, 60), (85, 62)], [(66, 30), (62, 98)]],
    5: [[(75, 6), (30, 8), (27, 45)], curve([(27, 45), (60, 42), (75, 68), (55, 92), (20, 88)])],
    6: [curve([(65, 5), (35, 35), (25, 70), (45, 94), (70, 80), (62, 58), (28, 66)])],
    7: [[(20, 10), (78, 10), (42, 95)]],
    9: [curve([(72, 30), (55, 8), (30, 18), (32, 42), (60, 48), (72, 30)]), [(72, 30), (62, 96)]],
}


def placed(digit, generator, left, top, side):
    """Returns the strokes of a digit in a square of `side` pixels, each point moved by up to a 50th of it."""
    points = [moved(stroke, 2, generator) for stroke in DIGITS[digit]]
    return [[(left + x * side / 100, top + y * side / 100) for x, y in stroke] for stroke in points]


@repeated
def bars(generator):
    """A 1 that is a plain bar, on 28 x 28 pixels or ten times as large."""
    scale = generator.choice([1, 10])
    width, height = generator.randint(3, 5) * scale, generator.randint(14, 27) * scale
    image = Image.new("L", (28 * scale, 28 * scale), 255)
    left, top = 12 * scale, 14 * scale - height // 2
    ImageDraw.Draw(image).rectangle((left, top, left + width - 1, top + height - 1), fill=0)
    return image, 1


@repeated
def tight_crops(generator):
    """A digit cut out along its outline, as programs do that find contours."""
    digit, side = generator.choice(list(DIGITS)), generator.choice([20, 60, 200])
    image = draw((2 * side, 2 * side), placed(digit, generator, side / 2, side / 2, side), max(2, side // 9))
    return image.crop(box_of(image)), digit


@repeated
def bars_beside_the_paper(generator):
    """A screenshot of a photo, with black bars at the left and right or above and below."""
    digit = generator.choice(list(DIGITS))
    image = draw((300, 400), placed(digit, generator, 95, 140, 110), 10, 215, 40)
    share, page = generator.uniform(0.05, 0.2), ImageDraw.Draw(image)
    if generator.random() < 0.5:
        page.rectangle((0, 0, 300 * share, 400), fill=0)
        page.rectangle((300 - 300 * share, 0, 300, 400), fill=0)
    else:
        page.rectangle((0, 0, 300, 400 * share), fill=0)
        page.rectangle((0, 400 - 400 * share, 300, 400), fill=0)
    return image, digit


@repeated
def tilted_ruling(generator):
    """Ruled paper, photographed at an angle, its lines nearly as dark as the pen."""
    digit, slope = generator.choice(list(DIGITS)), math.tan(math.radians(generator.uniform(2, 3)))
    image = draw((300, 400), placed(digit, generator, 80, 110, 150), 4, 215, 70)
    lines = Image.new("L", (300, 400), 215)
    for y in range(-200, 600, 40):
        ImageDraw.Draw(lines).line([(0, y), (300, y + 300 * slope)], fill=110, width=3)
    return ImageChops.darker(image, lines).filter(ImageFilter.GaussianBlur(1)), digit


@repeated
def uneven_paper(generator):
    """A small digit on a large paper that is crumpled, or with a dark strip of the table along its edge."""
    digit = generator.choice(list(DIGITS))
    grid = Image.new("L", (5, 8))
    grid.putdata([generator.randrange(256) for _ in range(40)])
    image = grid.resize((400, 800), Image.Resampling.BICUBIC).point(lambda v: 170 + (v - 128) / 12.8)
    pen, ink = (4, 100) if generator.random() < 0.5 else (7, 130)
    mask = draw((400, 800), placed(digit, generator, 190, 290, 80), pen, 0, 255)
    image.paste(ink, mask=mask)
    if pen == 7:
        ImageDraw.Draw(image).polygon([(0, 0), (400, 0), (400, 50), (0, 15)], fill=60)
    return image.filter(ImageFilter.GaussianBlur(1)), digit


@repeated
def badges(generator):
    """A mark of an app in a corner."""
    digit = generator.choice(list(DIGITS))
    image = draw((400, 300), placed(digit, generator, 130, 70, 150), 6)
    ImageDraw.Draw(image).rounded_rectangle((345, 270, 390, 290), 6, fill=generator.randint(0, 120))
    return image, digit


KINDS = [thick_rings, thick_tight_crops, strips, soft_pens, faint_pens, hard_shadows, frames, ruled_paper]
KINDS += [dotted_paper, wide_strips, closed_fours, thin_twos, straight_stems, hairlines]
KINDS += [opaque_patches, bars, tight_crops, bars_beside_the_paper]
WARNED = [tilted_ruling, uneven_paper, badges]  # should be read or get a warning
KINDS += WARNED
KINDS += [cluttered_photos, fainter_strokes, angular_sixes, ones_with_a_base]  # these are often misread


@torch.no_grad()
def count(model, images):
    """Returns how many of images, pairs with a digit, are read, misread with or without a warning, empty."""
    read = warned = other = empty = 0
    for image, digit in images:
        try:
            ink, warning = read_digit_and_warning(image)
        except ImageError:
            empty += 1
            continue
        if int(model(datafile.normalize(ink[None])).argmax()) == digit:
            read += 1
        elif warning:
            warned += 1
        else:
            other += 1
    return read, warned, other, empty


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="models/weights/Model_3.pth")
    model = checkpoint.load(parser.parse_args().checkpoint)
    print(f"{'kind':24}{'read':>6}{'warned':>8}{'other':>7}{'empty':>7}")
    for kind in KINDS:
        read, warned, other, empty = count(model, kind())
        print(f"{kind.__name__.replace('_', ' '):24}{read:6}{warned:8}{other:7}{empty:7}")


if __name__ == "__main__":
    main()
