"""Digits that are not MNIST's: drawn with handwriting-like fonts, as if photographed, scanned or exported.

python tests/measure/fonts.py best_Model_3.pth            # draws 110 in a folder that is then deleted
python tests/measure/fonts.py best_Model_3.pth 0 5 6 7 8  # 110 for each of these seeds
"""

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
from support.drawings import read_drawing  # noqa: E402

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


def stroke(font_name, digit, side, pen, angle):
    """Returns a grey picture of `side` pixels, 255 for ink, from a pen thicker than the font's own."""
    font = ImageFont.truetype(FONT_FOLDER / font_name, 400)
    picture = Image.new("L", (1000, 1000))
    draw = ImageDraw.Draw(picture)
    draw.text((500, 500), str(digit), fill=255, font=font, anchor="mm", stroke_width=pen)
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


def draw_all(folder, seed=0):
    """Draws each digit with each font, of a random size, pen, angle, paper and file format.

    Returns:
        Pairs of a path and the digit, an int.
    """
    generator = random.Random(seed)
    torch.manual_seed(seed)
    drawings = []
    for font in FONTS:
        for digit in range(10):
            side = round(30 * (2000 / 30) ** generator.random())  # as many small as large ones
            ink = stroke(font, digit, side, generator.choice([0, 0, 4, 10]), generator.uniform(-10, 10))
            kind = generator.choice(["clean", "photo", "transparent"])
            dark, light = generator.randint(0, 70), generator.randint(180, 255)
            dark_ink = generator.random() < 0.6
            name = f"{Path(font).stem}_{digit}_{kind}_{'dark' if dark_ink else 'light'}_{side}"
            if kind == "transparent":
                picture = Image.new("RGBA", (side, side), (*[dark if dark_ink else light] * 3, 255))
                picture.putalpha(ink)
                path = folder / f"{name}.png"
            else:
                alpha = pil_to_tensor(ink)[0] / 255
                if kind == "photo":
                    alpha = torch.maximum(alpha, stain(side, generator))
                paper, pen = (light, dark) if dark_ink else (dark, light)
                tint = torch.tensor([generator.uniform(0.8, 1) for _ in range(3)])[:, None, None]
                colours = paper * tint * (1 - alpha) + pen * alpha
                if kind == "photo":
                    colours = colours * uneven(side, generator) + 6 * torch.randn(1, side, side)
                picture = to_pil_image(colours.clamp(0, 255).byte())
                if kind == "photo":
                    picture = picture.filter(ImageFilter.GaussianBlur(side / 300))
                path = folder / f"{name}.{'jpg' if kind == 'photo' else 'png'}"
            picture.save(path)
            drawings.append((path, digit))
    return drawings


@torch.no_grad()
def accuracy(model, drawings):
    """Returns the fraction of the drawings, pairs of a path and a digit, that a model reads as that digit."""
    images = torch.stack([read_drawing(path) for path, _ in drawings])
    digits = torch.tensor([digit for _, digit in drawings])
    return float((model(datafile.normalize(images)).argmax(1) == digits).float().mean())


def main():
    path, *seeds = sys.argv[1:]
    model = checkpoint.load(Path(path))
    for seed in map(int, seeds or ["0"]):
        with tempfile.TemporaryDirectory() as folder:
            drawn = draw_all(Path(folder), seed)
            print(f"Of {len(drawn)} drawings, seed {seed}, {accuracy(model, drawn):.1%} are read")


if __name__ == "__main__":
    main()
