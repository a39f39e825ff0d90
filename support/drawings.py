"""A picture of one digit, drawn, photographed or exported, in the form of MNIST's images."""

import io
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageStat
from torch.nn.functional import interpolate, max_pool2d
from torchvision.transforms.functional import pil_to_tensor


class DrawingError(ValueError):
    """A file is no picture that can be read, or there is no digit in it."""


class SentDrawing(io.BytesIO):
    """The bytes of a picture that is in no file."""

    def __str__(self):
        return "the drawing"


def read_drawing(path):
    """Reads a picture of one digit and brings it into the form of MNIST's images.

    The paper may be lighter or darker than the ink, unevenly lit, coloured or transparent. As
    MNIST's own, the digit fills a box of 20 x 20 pixels, antialiased, and its centre of mass is the
    centre of the image (Y. LeCun et al., "Gradient-based learning applied to document recognition",
    Proc. IEEE 86(11), 1998).

    Args:
        path: of the file, or a `SentDrawing`.

    Returns:
        uint8 (28, 28), 0 for the background to 255 for ink.

    Raises:
        DrawingError: there is no such file, it is no picture, is too large, or there is nothing in it.
        OSError: the file cannot be read.
    """
    picture = open_picture(path)
    ink = find_ink(picture)
    if ink is None:
        raise DrawingError(f"{path} is empty: there is nothing on its background")
    # A second, closer look at the part where the digit is.
    scale = max(picture.size) / max(ink.shape)
    top, left, bottom, right = (round(scale * edge) for edge in bounding_box(ink, margin=4))
    closer = find_ink(picture.crop((left, top, min(right, picture.width), min(bottom, picture.height))))
    ink = ink if closer is None else closer
    top, left, bottom, right = bounding_box(ink, margin=0)
    ink = ink[top:bottom, left:right]

    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    digit = interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    digit = (digit / digit.max()).clamp(0, 1)
    image = torch.zeros(28, 28)
    offsets = []
    for side, sums in (height, digit.sum(1)), (width, digit.sum(0)):
        centre = float((sums * (torch.arange(side) + 0.5)).sum() / sums.sum())
        offsets.append(min(max(round(14 - centre), 0), 28 - side))
    y, x = offsets
    image[y : y + height, x : x + width] = digit
    return (image * 255).round().byte()


def read_drawings(paths):
    """Yields the path of each picture, and what `read_drawing` returns of it, or the error it raised.

    A folder stands for the pictures in it, as their names' endings tell; hidden ones are passed over.
    """
    for path in paths:
        files = [path]
        if path.is_dir():
            endings = Image.registered_extensions()
            try:
                files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in endings]
            except OSError as error:
                yield path, error
                continue
            files = [file for file in files if file.is_file() and not file.name.startswith(".")]
            if not files:
                yield path, DrawingError(f"there is no picture in the folder {path}")
        for file in files:
            try:
                yield file, read_drawing(file)
            except (OSError, DrawingError) as error:
                yield file, error


def open_picture(path):
    """Returns a picture file as a grey `PIL.Image` of up to 1,024 pixels a side; raises as `read_drawing`."""
    if not isinstance(path, SentDrawing) and not Path(path).is_file():
        raise DrawingError(f"{path} is no file" if Path(path).exists() else f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.draft(None, (1024, 1024))  # a JPEG is decoded no larger than that takes
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # more than 8 bits a pixel
                low, high = image.getextrema()
                scale = 255 / max(high - low, 1e-9)
                image = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
            image = image.convert("RGBA")
            image.thumbnail((1024, 1024))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DrawingError(f"{path} is too large: it has over {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except OSError as error:
        if error.errno:
            raise
        raise DrawingError(f"{path} is not a picture that can be read") from error
    except MemoryError:
        raise
    except Exception as error:  # there is no end to what a damaged file can raise
        raise DrawingError(f"{path} is not a picture that can be read") from error
    *channels, alpha = image.split()
    colour = Image.merge("RGB", channels)
    if alpha.getextrema()[0] < 255:
        # What is transparent is paper: of the opaque part's own colour where that is most of the picture.
        opaque = ImageStat.Stat(colour.convert("L"), mask=alpha)
        if ImageStat.Stat(alpha).mean[0] > 127:
            paper = opaque.median[0]
        else:
            paper = 255 if opaque.sum[0] < 128 * opaque.count[0] else 0
        colour.paste((paper,) * 3, mask=ImageOps.invert(alpha))
    return max((colour.convert("L"), *colour.split()), key=lambda channel: ImageStat.Stat(channel).stddev[0])


def find_ink(picture, side=128):
    """Tells ink from paper.

    The paper is the quadratic surface that fits most pixels, the ink what differs from it to the side
    that differs more. Stains much smaller than the digit are left out.

    Args:
        picture: a grey `PIL.Image`.
        side: pixels of the longer side of what is returned.

    Returns:
        float32 (H, W), from 0 for paper to 1 for ink, or None where there is no ink.
    """
    scale = side / max(picture.size)
    picture = picture.resize(
        [max(1, round(scale * length)) for length in picture.size], Image.Resampling.BICUBIC
    )
    grey = pil_to_tensor(picture)[0].float()
    height, width = grey.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([x**0, x, y, x * x, x * y, y * y]).flatten(1)
    edge = ((x.abs() > 0.9) | (y.abs() > 0.9)).flatten()
    weight, surface = edge.float(), torch.full((6, 1), torch.inf)
    for _ in range(20):
        before = surface
        weighted = weight * terms
        # By the normal equations, much less work than a least squares of all pixels.
        surface = torch.linalg.lstsq(weighted @ terms.T, weighted @ grey.view(-1, 1)).solution
        difference = (surface.T @ terms).view_as(grey) - grey
        if (surface - before).abs().max() < 0.01:  # of 255 shades
            break
        noise = 1.5 * difference.flatten()[weight > 0].abs().median().clamp(min=1)
        weight = 1 / (1 + (difference.flatten() / (2 * noise)) ** 2) ** 2
    if (difference**3).sum() < 0:
        difference = -difference
    difference = difference.clamp(min=0)
    level = otsu_threshold(difference)
    full = difference[difference > level].median() if (difference > level).any() else torch.tensor(0.0)
    if full < max(8, 4 * noise):
        return None
    low = max(0.2 * full, min(2 * noise, 0.5 * full))
    ink = ((difference - low) / (full - low)).clamp(0, 1)
    return ink * large_components(ink > 0.3, ink)


def otsu_threshold(values):
    """The threshold between two classes of values: N. Otsu, IEEE Trans. SMC 9(1), 1979."""
    values = values.flatten().sort().values
    n = torch.arange(1, len(values))
    lower, total = values.cumsum(0)[:-1], values.sum()
    between = n * (len(values) - n) * (lower / n - (total - lower) / (len(values) - n)) ** 2
    return values[between.argmax()]


def large_components(mask, ink):
    """Returns the parts of a bool mask (H, W) that have at least a tenth of the ink that the largest has."""
    numbers = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    while True:
        spread = max_pool2d(numbers[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, numbers):
            break
        numbers = spread.flatten()[(spread.long() - 1).clamp(min=0)] * mask  # its number is a pixel with one
    sums = torch.zeros(mask.numel() + 1).index_add_(0, numbers.flatten().long(), (ink * mask).flatten())
    sums[0] = 0
    return (sums >= sums.max() / 10)[numbers.long()] & mask


def bounding_box(ink, margin):
    """Returns the pixels at top, left, bottom and right of the ink, with a margin inside the picture."""
    edges = []
    for dimension, length in enumerate(ink.shape):
        found = (ink > 0.3).any(1 - dimension).nonzero()
        edges.append((max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right
