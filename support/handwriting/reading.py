"""Conversion of photos and drawings of digits to MNIST's format."""

import contextlib
import math
import os
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageStat, PngImagePlugin  # Pillow comes with torchvision
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad
from torchvision.transforms.functional import pil_to_tensor

from support.exits import RunError
from support.files import expand

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long comments are allowed
SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_AREA = 1024 * 1024  # pixels of an image in memory
PEN = 0.04  # the width to which thinner strokes are widened, as a share of the digit's size
SIDE = 128  # the background is subtracted in an image of about SIDE x SIDE pixels


class ImageError(RunError):
    """A file is not an image that can be read, or contains no digit."""


def find_images(paths):
    """Returns the paths of images, the paths of other files in the directories, and what could not be read.

    Directories are replaced by the image files in them and in their subdirectories, by extension; hidden
    files are excluded. What could not be read is a list of OSErrors, one for each directory.
    """
    images, others, errors = [], [], []
    for path in expand(paths):
        if not path.is_dir():
            images.append(path)
            continue
        for folder, folders, names in os.walk(path, onerror=errors.append):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            for name in sorted(names):
                file = Path(folder, name)
                if name[0] != "." and file.is_file():
                    kind = images if file.suffix.lower() in SUFFIXES else others
                    kind.append(file)
    return images, others, errors


def read_digit(source):
    """Reads an image of one digit and converts it to MNIST's format.

    The background may be lighter or darker than the ink, unevenly lit, ruled, colored or transparent. As in
    MNIST, the digit is scaled to fit a box of 20 x 20 pixels, antialiased, and its center of mass is
    moved to the center of the image (Y. LeCun et al., "Gradient-based learning applied to document
    recognition", Proc. IEEE 86(11), 1998).

    Args:
        source: path of an image file, a binary file object or a `PIL.Image`.

    Returns:
        uint8 (28, 28), 0 for the background to 255 for ink.

    Raises:
        ImageError: the file does not exist, is not an image, is too large, or contains no ink.
        OSError: the file cannot be read.
    """
    return read_digit_and_warning(source)[0]


def read_digit_and_warning(source):
    """Returns the result of `read_digit`, and a warning if it may not be a single digit, else ""."""
    name = source if isinstance(source, str | Path) else "the image"
    image, pages = open_image(source, name)
    picture = to_grayscale(image)
    for subtract in subtract_surface, subtract_closing:
        ink, sign = find_ink(picture, subtract)
        if ink is not None:
            break
    else:
        raise ImageError(f"{name} is empty: nothing stands out from the background")
    lines = find_lines(ink)
    ink = ink * ~lines
    # A second, closer look at the part that contains the digit.
    top, left, bottom, right = bounding_box(ink, margin=4)
    height, width = ink.shape
    x0, x1 = left * picture.width // width, -(-right * picture.width // width)
    y0, y1 = top * picture.height // height, -(-bottom * picture.height // height)
    closer, _ = find_ink(picture.crop((x0, y0, x1, y1)), subtract, sign)
    if closer is not None and lines.any():
        near = max_pool2d(ink[None, None, top:bottom, left:right], 9, 1, 4)
        closer = closer * (interpolate(near, closer.shape, mode="bilinear")[0, 0] > 0.1)
    digit = center(closer if closer is not None and (closer > 0.3).any() else ink)
    warnings = [warning_on(ink), f"only the first of {pages} pages was read" * (pages > 1)]
    return digit, "; ".join(filter(None, warnings))


def warning_on(ink):
    """Returns a warning if ink, float32 (H, W), does not look like a single digit, else ""."""
    top, left, bottom, right = bounding_box(ink, margin=0)
    labels = label_components(ink > 0.3)
    boxes = [bounding_box((labels == label).float(), margin=0) for label in labels.unique()[1:]]
    height = max(bottom - top for top, _, bottom, _ in boxes)
    boxes = [box for box in boxes if box[2] - box[0] > 0.6 * height]
    gap = (0.12 if right - left < 1.4 * height else 0.02) * height  # parts of one digit are closer
    digits = []  # groups of boxes
    for box in boxes:
        near = [group for group in digits if any(is_near(box, other, gap) for other in group)]
        digits = [group for group in digits if group not in near] + [sum(near, [box])]
    if len(digits) > 1:
        return f"this looks like {len(digits)} digits, not one"
    is_spot = pen_width(ink) > 0.33 * max(bottom - top, right - left)
    return "this may not be a digit" if is_spot or right - left > 2.2 * (bottom - top) else ""


def is_near(box, other, gap):
    """Returns True if two boxes (top, left, bottom, right) are at most `gap` apart in both directions."""
    return all(max(box[i], other[i]) - min(box[i + 2], other[i + 2]) <= gap for i in (0, 1))


def center(ink):
    """Scales ink, float32 (H, W), to fit a box of 20 x 20 pixels and centers its centroid; uint8 (28, 28)."""
    top, left, bottom, right = bounding_box(ink, margin=0)
    ink = ink[top:bottom, left:right]
    if (missing := PEN * max(ink.shape) - pen_width(ink)) > 0:  # thin strokes would become faint
        size = 1 + 2 * math.ceil(missing / 2)
        ink = max_pool2d(ink[None, None], size, 1, size // 2)[0, 0]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    digit = interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    digit = (digit / digit.max()).clamp(0, 1)
    image = torch.zeros(28, 28)
    offsets = []
    for side, sums in (height, digit.sum(1)), (width, digit.sum(0)):
        centroid = float((sums * (torch.arange(side) + 0.5)).sum() / sums.sum())
        offsets.append(min(max(round(14 - centroid), 0), 28 - side))
    y, x = offsets
    image[y : y + height, x : x + width] = digit
    return (image * 255).round().byte()


def open_image(source, name):
    """Returns an upright RGBA image of at most about 1,024 x 1,024 pixels, and its number of pages.

    Args:
        source: path of an image file, a binary file object or a `PIL.Image`.
        name: name of the source, for error messages.
    """
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise ImageError(f"{name}: {'not a regular file' if Path(source).exists() else 'no such file'}")
    try:
        image = source.copy() if isinstance(source, Image.Image) else Image.open(source)
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its preview
        image.draft(None, scaled_size(image))  # decodes a JPEG at a fraction of its size
        limit = Image.MAX_IMAGE_PIXELS or math.inf
        if math.prod(image.size) > limit:
            raise Image.DecompressionBombError
        image.load()
        with contextlib.suppress(Exception):  # corrupt metadata can raise almost anything
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits per pixel
            image = image.convert(image.mode[0]).convert("F")
            low, high = image.getextrema()
            scale = 255 / max(high - low, 1e-9)
            image = image.point(lambda value: value * scale - low * scale).convert("L")
        image = image.convert("RGBA")
        image.thumbnail(scaled_size(image))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: it has over {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # a corrupt file can raise almost anything
        if isinstance(error, OSError) and error.errno:
            raise
        raise ImageError(f"{name} is not an image that can be read") from error
    return image, pages


def scaled_size(image):
    """Returns the width and height of an image, scaled down to `MAX_AREA` if it is larger."""
    scale = min(1, math.sqrt(MAX_AREA / math.prod(image.size)))
    return [max(1, math.ceil(scale * side)) for side in image.size]


def to_grayscale(image):
    """Returns the channel of an RGBA image with the highest contrast: a color or the luminance, mode "L"."""
    *channels, alpha = image.split()
    color = Image.merge("RGB", channels)
    if alpha.getextrema()[0] < 255 and (box := alpha.getbbox()):
        # Transparent pixels are background. So is the median color of an opaque part with a second color.
        opaque = ImageStat.Stat(color.convert("L"), mask=alpha)
        if ImageStat.Stat(alpha.crop(box)).mean[0] > 127 and opaque.stddev[0] > 20:
            color, alpha = color.crop(box), alpha.crop(box)
            background = opaque.median[0]
        else:
            background = 255 if opaque.sum[0] < 128 * opaque.count[0] else 0
        color.paste((background,) * 3, mask=ImageOps.invert(alpha))
    return max((color.convert("L"), *color.split()), key=lambda channel: ImageStat.Stat(channel).stddev[0])


def find_ink(picture, subtract, sign=None):
    """Separates ink from background.

    Args:
        picture: a grayscale `PIL.Image`.
        subtract: `subtract_surface` or `subtract_closing`.
        sign: 1 if the ink is darker than the background, -1 if it is lighter; by default, and always with
            `subtract_surface`, it is determined from the image.

    Returns:
        The ink, float32 (H, W), from 0 for background to 1 for ink, or None if there is none. Frames, shadows
            and spots much smaller than the digit are left out.
        The sign of the ink.
    """
    scale = SIDE / math.sqrt(math.prod(picture.size))
    size = [max(1, round(scale * length)) for length in picture.size]
    gray = pil_to_tensor(picture.resize(size, Image.Resampling.BICUBIC))[0].float()
    difference, noise, sign = subtract(gray, sign)
    level = otsu_threshold(difference)
    full = difference[difference > level].median() if (difference > level).any() else torch.tensor(0.0)
    if full < 4 * noise:
        return None, sign
    low = max(0.2 * full, min(2 * noise, 0.5 * full))
    ink = ((difference - low) / (full - low)).clamp(0, 1)
    return ink * large_components(ink), sign


def subtract_surface(gray, _):
    """Subtracts a robustly fitted quadratic surface, the background, from an image (H, W).

    Returns:
        The absolute difference, 0 for pixels whose difference has the other sign than the ink.
        The scale of the noise, at least 2 gray levels.
        The sign of the ink, which is the sign of the larger differences.
    """
    height, width = gray.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([x**0, x, y, x * x, x * y, y * y]).flatten(1)
    edge = ((x.abs() > 0.9) | (y.abs() > 0.9)).flatten()
    weight, surface = edge.float(), torch.full((6, 1), torch.inf)
    for _ in range(20):  # iteratively reweighted least squares, starting from the edge of the image
        before = surface
        weighted = weight * terms
        # Solving the normal equations is much cheaper than least squares over all pixels.
        surface = torch.linalg.lstsq(weighted @ terms.T, weighted @ gray.reshape(-1, 1)).solution
        difference = (surface.T @ terms).view_as(gray) - gray
        if (surface - before).abs().max() < 0.01:  # of 255 gray levels
            break
        noise = 1.5 * difference.flatten()[weight > 0].abs().median().clamp(min=1)
        weight = 1 / (1 + (difference.flatten() / (2 * noise)) ** 2) ** 2
    sign = 1 if (difference**3).sum() >= 0 else -1
    return (sign * difference).clamp(min=0), max(noise, 2), sign


def subtract_closing(gray, sign):
    """Subtracts an image (H, W) from its morphological closing.

    This is the fallback for digits that fill the image, for shadows and for faint ink. Closing fills dark
    parts that are narrower than a square of 55 pixels. Returns the same as `subtract_surface`, but a noise
    of at least 0.6 gray levels.
    """
    sign = sign or (1 if has_dark_ink(gray) else -1)
    gray = sign * gray
    for image in gray, gray.T:  # remove a linear gradient (light from one side)
        step = max(1, len(image) // 8)
        if len(image) > step:
            image -= (image[step:] - image[:-step]).median() / step * torch.arange(len(image))[:, None]
    smooth = avg_pool2d(gray[None, None], 3, 1, 1, count_include_pad=False)
    height, width = size = [min(55, length) for length in gray.shape]
    # Dilation, then erosion, with squares inside the image.
    lightest = pad(max_pool2d(smooth, size, 1), (width - 1,) * 2 + (height - 1,) * 2, value=torch.inf)
    closed = -max_pool2d(-lightest, size, 1)[0, 0]
    difference = closed - gray
    if sign > 0:  # ink in a shadow is darker in proportion
        difference = difference * closed.max() / closed.clamp(min=32)
    noise = 1.5 * (gray - smooth[0, 0]).abs().median()
    return (difference - difference.quantile(0.1)).clamp(min=0), max(noise, 0.6), sign


def border(values):
    """Returns the outermost pixels of an image (H, W)."""
    return torch.cat([values[[0, -1]].flatten(), values[1:-1, [0, -1]].flatten()])


def has_dark_ink(gray):
    """Returns True if the ink of an image (H, W) is darker than its border and its corners."""
    low, high = gray.flatten().quantile(torch.tensor([0.02, 0.98]))
    is_light = (gray > (low + high) / 2).float()
    corners = is_light[[0, -1]][:, [0, -1]]
    return bool(border(is_light).mean() + corners.mean() > 1)


def find_lines(ink):
    """Returns the pixels, bool (H, W), of ruled lines, if there are any.

    These are straight lines from edge to edge that are thinner than the pen. At least two are parallel: a
    single one may be a stroke of a digit that fills the image.
    """
    lines = torch.zeros_like(ink, dtype=torch.bool)
    thickness, parallel = 0, 0
    for values, found in (ink, lines), (ink.T, lines.T):
        mask = values > 0.3
        filled = mask.float().mean(1)
        nearby = -max_pool2d(-filled[None, None], (1, 9), 1, (0, 4))[0, 0]
        rows = (filled > 0.85) & (nearby < 0.5) & mask[:, :4].any(1) & mask[:, -4:].any(1)
        number = int((rows[1:] & ~rows[:-1]).sum() + rows[0])
        parallel = max(parallel, number)
        if number:
            thickness = max(thickness, float(values[rows].mean(1).sum() / number))
        found |= max_pool2d(rows.float()[None, None], (1, 3), 1, (0, 1))[0, 0, :, None] > 0
    rest = ink * ~lines
    is_ruled = parallel > 1 and (rest > 0.3).any() and thickness < pen_width(rest)
    return lines if is_ruled else torch.zeros_like(lines)


def pen_width(ink):
    """Returns the width in pixels of the strokes of ink, float32 (H, W): twice its area over its outline."""
    mask = (ink > 0.3).float()
    inside = -max_pool2d(-mask[None, None], 3, 1, 1)
    return float(2 * mask.sum() / (mask.sum() - inside.sum()).clamp(min=1))


def otsu_threshold(values):
    """Returns the threshold between two classes of values: N. Otsu, IEEE Trans. SMC 9(1), 1979."""
    values = values.flatten().sort().values
    n = torch.arange(1, len(values))
    lower, total = values.cumsum(0)[:-1], values.sum()
    between = n * (len(values) - n) * (lower / n - (total - lower) / (len(values) - n)) ** 2
    return values[between.argmax()]


def large_components(ink):
    """Returns the pixels, bool (H, W), of the components with at least a tenth of the largest one's ink.

    Components along more than `SIDE` pixels of the image's edge, such as frames and shadows, do not count if
    another one has a tenth of the largest one's ink.
    """
    labels = label_components(ink > 0.3)
    sums = torch.zeros(ink.numel() + 1).index_add_(0, labels.flatten(), ink.flatten())
    sums[0] = 0  # the background
    inside = sums.clone()
    inside[border(labels).bincount(minlength=len(sums)) > SIDE] = 0
    if inside.max() > 0.1 * sums.max():
        sums = inside
    return (sums >= sums.max() / 10)[labels] & (labels > 0)


def label_components(mask):
    """Returns a label for each pixel of a bool mask (H, W), int64: one for each component, 0 outside them.

    Components less than two pixels apart may be joined: the labels are found at half the resolution.
    """
    small = max_pool2d(mask.float()[None, None], 2, ceil_mode=True)[0, 0]
    labels = torch.arange(1.0, small.numel() + 1).view_as(small) * small
    while True:
        spread = max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * small
        if torch.equal(spread, labels):
            break
        # Each label is the index of a pixel, so follow it to that pixel's label (pointer jumping).
        labels = spread.flatten()[(spread.long() - 1).clamp(min=0)] * small
    height, width = mask.shape
    return labels.long().repeat_interleave(2, 0).repeat_interleave(2, 1)[:height, :width] * mask


def bounding_box(ink, margin):
    """Returns the top, left, bottom and right of the ink in pixels, with a margin inside the image."""
    edges = []
    for dimension, length in enumerate(ink.shape):
        found = (ink > 0.3).any(1 - dimension).nonzero()
        edges.append((max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right
