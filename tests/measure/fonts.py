"""Draws digits in handwriting-like fonts and of lines, as if photographed or exported, and reads them.

python tests/measure/fonts.py best_Model_3.pth            # draws 191 in a folder that is then deleted
python tests/measure/fonts.py best_Model_3.pth 0 5 6 7 8  # 191 for each of these seeds
"""

import argparse
import itertools
import math
import random
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import datafile  # noqa: E402
from support import checkpoint  # noqa: E402
from support.handwriting.reading import read_digit  # noqa: E402

FONTS = [  # from the Debian packages that .ci/run installs
    "truetype/fifthhorseman/dkg.ttf",
    "truetype/breip/Breip.ttf",
    "opentype/bwht/BecauseWeBuild-Regular.otf",
    "opentype/bwht/BecauseWeCreate-Regular.otf",
    "opentype/bwht/BecauseWeLearn-Regular.otf",
    "opentype/dancingscript/DancingScript-Regular.otf",
    "truetype/humor-sans/Humor-Sans.ttf",
    "truetype/kristi/Kristi.ttf",
    "truetype/rufscript/Rufscript010.ttf",
    "opentype/kaushanscript/KaushanScript-Regular.otf",
    "opentype/comic-neue/ComicNeue-Regular.otf",
]
FONT_FOLDER = Path("/usr/share/fonts")


def text(font_name, digit, pen):
    """Returns a picture (gray, 255 for ink) of a digit, from a pen thicker than the font's own."""
    font = ImageFont.truetype(FONT_FOLDER / font_name, 400)
    picture = Image.new("L", (1000, 1000))
    ImageDraw.Draw(picture).text((500, 500), str(digit), fill=255, font=font, anchor="mm", stroke_width=pen)
    return picture


def lines(strokes, pen):
    """Returns a picture (gray, 255 for ink) of strokes, each a list of points, on a page of 1,000 pixels."""
    picture = Image.new("L", (1000, 1000))
    draw = ImageDraw.Draw(picture)
    for points in strokes:
        draw.line(points, fill=255, width=pen, joint="curve")
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return picture


def one(length, angle, slant, pen):
    """A 1 whose upstroke is `length` heights long, `angle` degrees below the horizontal, its stem slanted."""
    x, y = 500 + 200 * slant, 300
    down = 400 * length * math.sin(math.radians(angle))
    end = x - 400 * length * math.cos(math.radians(angle)) - down * slant, y + down
    return lines([[end, (x, y), (x - 400 * slant, y + 400)]], pen)


def seven(length, angle, slope, pen, crossbar):
    """A 7 whose bar is `length` heights long and slopes up, its stem `angle` degrees from the vertical."""
    x, y = 550, 300
    bottom = x - 400 * math.tan(math.radians(angle)), y + 400
    middle = (x + bottom[0]) / 2
    strokes = [[(x - 400 * length, y + 400 * length * slope), (x, y), bottom]]
    return lines(strokes + [[(middle - 80, 500), (middle + 80, 500)]] * crossbar, pen)


def turned(picture, side, angle):
    """Returns the digit turned by some degrees, in a picture of `side` pixels with a margin around it."""
    picture = picture.rotate(angle, Image.Resampling.BICUBIC)
    left, top, right, bottom = picture.getbbox()
    margin = 0.25 * max(right - left, bottom - top)
    half = max(right - left, bottom - top) / 2 + margin
    x, y = (left + right) / 2, (top + bottom) / 2
    picture = picture.crop([round(edge) for edge in (x - half, y - half, x + half, y + half)])
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def stain(side, generator):
    """Returns a spot of a twentieth of the picture's side near its edge, 1, on 0."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    radius, down = max(1, side / 40), generator.uniform(0.1, 0.9) * side
    return ((x - 0.06 * side) ** 2 + (y - down) ** 2 < radius**2).float()


def uneven(side, generator):
    """Returns a shading of the paper, from 0.6 to 1, as a lamp at one side gives."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    angle = generator.uniform(0, 2 * math.pi)
    slope = x * math.cos(angle) + y * math.sin(angle)
    return 0.8 + 0.14 * slope + 0.06 * (1 - x * x - y * y)


def save(picture, name, folder, generator):
    """Saves a digit in a random size, on a random paper and in a random format; returns the path."""
    side = round(30 * (2000 / 30) ** generator.random())  # as many small as large ones
    ink = turned(picture, side, generator.uniform(-10, 10))
    kind = generator.choice(["clean", "photo", "transparent"])
    dark, light = generator.randint(0, 70), generator.randint(180, 255)
    dark_ink = generator.random() < 0.6
    path = folder / f"{name}_{kind}_{'dark' if dark_ink else 'light'}_{side}.png"
    if kind == "transparent":
        picture = Image.new("RGBA", (side, side), (*[dark if dark_ink else light] * 3, 255))
        picture.putalpha(ink)
    else:
        alpha = pil_to_tensor(ink)[0] / 255
        if kind == "photo":
            alpha = torch.maximum(alpha, stain(side, generator))
        paper, pen = (light, dark) if dark_ink else (dark, light)
        tint = torch.tensor([generator.uniform(0.8, 1) for _ in range(3)])[:, None, None]
        colors = paper * tint * (1 - alpha) + pen * alpha
        if kind == "photo":
            colors = colors * uneven(side, generator) + 6 * torch.randn(1, side, side)
        picture = to_pil_image(colors.clamp(0, 255).byte())
        if kind == "photo":
            picture = picture.filter(ImageFilter.GaussianBlur(side / 300))
            path = path.with_suffix(".jpg")
    picture.save(path)
    return path


def draw_all(folder, seed=0):
    """Draws each digit with each font, and as many ones and sevens as people write them in Europe.

    Returns:
        A dict from the kind of drawing to pairs of a path and the digit, an int.
    """
    generator = random.Random(seed)
    torch.manual_seed(seed)
    drawings = {"in fonts": [], "ones with an upstroke": [], "sevens": [], "sevens with a crossbar": []}
    for font, digit in itertools.product(FONTS, range(10)):
        picture = text(font, digit, generator.choice([0, 0, 4, 10]))
        path = save(picture, f"{Path(font).stem}_{digit}", folder, generator)
        drawings["in fonts"].append((path, digit))
    for length, angle, pen in itertools.product([0.3, 0.45, 0.6], [35, 45, 55], [25, 40, 60]):
        name = f"1_{length}_{angle}_{pen}"
        path = save(one(length, angle, generator.uniform(0, 0.4), pen), name, folder, generator)
        drawings["ones with an upstroke"].append((path, 1))
    for length, angle, pen, crossbar in itertools.product(
        [0.45, 0.6, 0.75], [10, 20, 30], [25, 40, 60], [False, True]
    ):
        picture = seven(length, angle, generator.uniform(-0.1, 0.1), pen, crossbar)
        path = save(picture, f"7_{length}_{angle}_{pen}_{crossbar}", folder, generator)
        drawings["sevens with a crossbar" if crossbar else "sevens"].append((path, 7))
    return drawings


@torch.no_grad()
def accuracy(model, drawings):
    """Returns the fraction of the drawings, pairs of a path and a digit, that a model reads as that digit."""
    images = torch.stack([read_digit(path) for path, _ in drawings])
    digits = torch.tensor([digit for _, digit in drawings])
    return float((model(datafile.normalize(images)).argmax(1) == digits).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("seeds", nargs="*", type=int, default=[0])
    args = parser.parse_args()
    model = checkpoint.load(args.checkpoint)
    shares = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for kind, drawn in draw_all(Path(folder), seed).items():
                shares.setdefault(kind, []).append((len(drawn), accuracy(model, drawn)))
    for kind, read in shares.items():
        number = sum(count for count, _ in read)
        print(f"{kind}: of {number} drawings, {sum(n * share for n, share in read) / number:.1%} are read")


if __name__ == "__main__":
    main()
