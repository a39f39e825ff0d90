"""Conversion of photos and drawings of digits to MNIST's format."""

import contextlib
import math
import os
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageStat, PngImagePlugin  # Pillow comes with torchvision
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from support.exits import RunError
from support.files import expand

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long comments are allowed
SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_AREA = 1024 * 1024  # pixels of an image in memory
PEN = 0.04  # the width to which thinner strokes are widened, as a share of the digit's size
SIDE = 128  # the background is estimated in an image of about SIDE x SIDE pixels
INK = 0.3  # a pixel with more ink than this belongs to a stroke


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
    picture = cut_bars(to_grayscale(image))
    digit, warning = find_digit(picture)
    if digit is None:
        raise ImageError(f"{name} is empty: nothing stands out from the background")
    top, left, bottom, right = bounding_box(digit > INK)
    side = max(bottom - top, right - left)
    if side < SIDE / 3:  # once more, in the picture around the digit
        box = left - side, top - side, right + side, bottom + side
        closer, _ = find_digit(crop(picture, box, picture.width / digit.shape[1]))
        digit = digit if closer is None else closer
    pages_warning = f"only the first of {pages} pages was read" if pages > 1 else ""
    return center(digit), "; ".join(filter(None, [warning, pages_warning]))


def find_digit(picture):
    """Returns the ink of the digit in a grayscale picture, float32 (H, W), or None, and a warning or ""."""
    scale = min(1, SIDE / math.sqrt(math.prod(picture.size)))
    size = [max(1, round(scale * length)) for length in picture.size]
    ink = find_ink(to_tensor(picture.resize(size, Image.Resampling.BICUBIC)))
    if ink is None:
        return None, ""
    if edge_contacts(ink) > 6:
        ink = remove_lines(ink)
    digit, warning = largest_group(ink)
    if edge_contacts(ink) > 6:
        warning = "lines or shadows may have been read"
    return digit, warning


def to_tensor(picture):
    """Returns a grayscale `PIL.Image` as a tensor, float32 (H, W), from 0 to 255."""
    return pil_to_tensor(picture)[0].float()


def cut_bars(picture):
    """Cuts off edges of a single color if what they enclose begins with another: letterboxes and frames."""
    small = picture.copy()
    small.thumbnail((256, 256), Image.Resampling.BOX)
    gray = to_tensor(small)
    color = border(gray).median()
    differs = (gray - color).abs() > 12
    if not differs.any():
        return picture
    top, left, bottom, right = bounding_box(differs)
    inside = gray[top:bottom, left:right]
    share = inside.numel() / gray.numel()
    if share < 0.4 or share == 1 or (border(inside) - color).abs().quantile(0.1) < 30:
        return picture
    return cut_bars(crop(picture, (left, top, right, bottom), picture.width / small.width))


def crop(picture, box, scale):
    """Returns the part of a picture inside a box (left, top, right, bottom) times a scale."""
    limits = 2 * picture.size  # Pillow would add black pixels outside the picture
    return picture.crop([min(max(0, round(edge * scale)), limit) for edge, limit in zip(box, limits)])


def find_ink(gray):
    """Returns the ink in an image (H, W), from 0 to 1, or None if nothing stands out from the background.

    The background is that of the first of three methods from which something stands out.
    """
    for method, contrast in (border_median, 8), (fit_surface, 4), (close, 4):
        background, noise, sign = method(gray)
        difference = (sign * (background - gray)).clamp(min=0)
        full = typical_ink(difference)
        if full >= contrast * noise:
            low = min(2 * noise, 0.5 * full)
            return ((difference - low) / (full - low)).clamp(0, 1)
    return None


def border_median(gray):
    """The background of a plain picture; returns it, the scale of its noise in gray levels, and the sign."""
    edge = border(gray)
    background = edge.median()
    noise = 1.5 * (edge - background).abs().median()
    return background, max(noise, 2), sign_of_ink(background - gray)


def fit_surface(gray):
    """A quadratic surface, robustly fitted, for uneven light; returns the same as `border_median`."""
    height, width = gray.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).flatten(1)
    weight = ((x.abs() > 0.9) | (y.abs() > 0.9)).flatten()
    for _ in range(10):  # iteratively reweighted least squares, starting from the edge of the image
        weighted = weight * terms
        # Solving the normal equations is much cheaper than least squares over all pixels.
        surface = torch.linalg.lstsq(weighted @ terms.T, weighted @ gray.reshape(-1, 1)).solution
        difference = (surface.T @ terms).view_as(gray) - gray
        noise = 1.5 * difference.flatten()[weight > 0].abs().median().clamp(min=1)
        weight = 1 / (1 + (difference.flatten() / (2 * noise)) ** 2) ** 2
    return gray + difference, max(noise, 2), sign_of_ink(difference)


def close(gray):
    """A surface and a morphological closing, for shadows and faint ink; returns the same as `border_median`.

    The closing fills parts that are narrower than a square of 55 pixels.
    """
    surface, _, sign = fit_surface(gray)
    gray = gray - surface
    smooth = sign * avg_pool2d(gray[None, None], 3, 1, 1)
    size = [min(55, length) for length in gray.shape]
    # Dilation, then erosion, with squares inside the image.
    margins = size[1] - 1, size[1] - 1, size[0] - 1, size[0] - 1
    closed = -max_pool2d(-pad(max_pool2d(smooth, size, 1), margins, value=torch.inf), size, 1)[0, 0]
    noise = 1.5 * (sign * gray - smooth[0, 0]).abs().median()
    return surface + sign * closed, max(noise, 0.6), sign


def sign_of_ink(difference):
    """Returns 1 if the larger differences from the background are those of darker pixels, else -1."""
    return 1 if (difference**3).sum() >= 0 else -1


def typical_ink(difference):
    """Returns the median of what Otsu's threshold separates from the background.

    If something is three times as strong, what was separated is taken for an uneven background, and the
    threshold is applied to it again.
    """
    above = difference.flatten()
    while len(above) > 1:
        above = above[above > otsu_threshold(above)]
        if len(above) and above.max() < 3 * above.median():
            return above.median()
    return torch.tensor(0.0)


def edge_contacts(ink):
    """Returns how often strokes touch the edge of ink (H, W): each line of ruled paper does so twice."""
    mask = ink > INK
    around = torch.cat([mask[0], mask[1:, -1], mask[-1, :-1].flip(0), mask[1:-1, 0].flip(0)])
    return int((around & ~around.roll(1)).sum())


def remove_lines(ink):
    """Removes straight lines of 81 pixels and more from ink (H, W), except where they cross strokes."""
    rest = ink[None, None]
    for size, padding in ((1, 81), (0, 40)), ((81, 1), (40, 0)):
        lines = max_pool2d(-max_pool2d(-ink[None, None], size, 1, padding), size, 1, padding)
        rest = rest * (max_pool2d(lines, 3, 1, 1) < INK)
    rest = -max_pool2d(-max_pool2d(rest, 7, 1, 3), 7, 1, 3)[0, 0].minimum(ink)
    return rest if (rest > INK).any() else ink


def largest_group(ink):
    """Returns the ink (H, W) of the largest component and those near it, and a warning or ""."""
    labels = label_components(ink > INK)
    sums = torch.zeros(ink.numel() + 1).index_add_(0, labels.flatten(), ink.flatten())
    sums[0] = 0  # the background
    inside = sums.clone()
    inside[border(labels).bincount(minlength=len(sums)) > min(ink.shape)] = 0  # shadows and frames
    if inside.max() > 0.1 * sums.max():
        sums = inside
    top, left, bottom, right = bounding_box(labels == sums.argmax())
    gap = round(0.2 * max(bottom - top, right - left))
    near = labels[max(0, top - gap) : bottom + gap, max(0, left - gap) : right + gap].unique()
    group = near[sums[near] > 0]
    digit = ink * torch.isin(labels, group)
    top, left, bottom, right = bounding_box(digit > INK)
    height = bottom - top
    width = right - left
    others = sums.clone()
    others[group] = 0
    if others.max() > 0.15 * sums.max() or (len(group) > 1 and width > 1.4 * height):
        return digit, "this looks like more than one digit"
    if width > 2.2 * height or pen_width(digit) > 0.33 * max(height, width):
        return digit, "this may not be a digit"
    return digit, ""


def center(ink):
    """Scales ink, float32 (H, W), to fit a box of 20 x 20 pixels and centers its centroid; uint8 (28, 28)."""
    top, left, bottom, right = bounding_box(ink > INK)
    ink = ink[top:bottom, left:right]
    if (missing := PEN * max(ink.shape) - pen_width(ink)) > 0:  # thin strokes would become faint
        pen = 1 + 2 * math.ceil(missing / 2)
        ink = max_pool2d(ink[None, None], pen, 1, pen // 2)[0, 0]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    digit = interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0]
    digit = digit / digit.max()
    image = torch.zeros(28, 28)
    offsets = []
    for side, sums in zip(size, (digit.sum(1), digit.sum(0))):
        centroid = float((sums * (torch.arange(side) + 0.5)).sum() / sums.sum())
        offsets.append(min(max(round(14 - centroid), 0), 28 - side))
    y, x = offsets
    image[y : y + size[0], x : x + size[1]] = digit
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
        with contextlib.suppress(Exception):  # corrupt metadata can raise almost anything
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits per pixel
            values = pil_to_tensor(image.convert(image.mode[0]).convert("F"))[0]
            is_valid = values.abs() < 1e9  # neither NaN nor a mark of missing data, which is background
            values = values.where(is_valid, values[is_valid].median())
            scaled = (values - values.min()) * (255 / (values.max() - values.min()).clamp(min=1e-9))
            image = to_pil_image(scaled.round().byte())
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
    color = image.convert("RGB")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] < 255 and (box := alpha.getbbox()):
        # Transparent pixels become black or white, whichever is further from the mean of the others.
        opaque = ImageStat.Stat(color.convert("L"), mask=alpha)
        background = (255,) * 3 if opaque.sum[0] < 128 * opaque.count[0] else (0,) * 3
        color.paste(background, mask=ImageOps.invert(alpha))
        color = ImageOps.expand(color.crop(box), max(box[2] - box[0], box[3] - box[1]) // 5, background)
    small = color.resize((64, 64))
    contrasts = ImageStat.Stat(Image.merge("RGBA", (*small.split(), small.convert("L")))).stddev
    if contrasts[3] >= max(contrasts[:3]):
        return color.convert("L")
    return color.getchannel(contrasts.index(max(contrasts[:3])))


def border(values):
    """Returns the outermost pixels of an image (H, W)."""
    return torch.cat([values[[0, -1]].flatten(), values[1:-1, [0, -1]].flatten()])


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
        labels = spread.flatten()[spread.long() - 1] * small
    height, width = mask.shape
    return labels.long().repeat_interleave(2, 0).repeat_interleave(2, 1)[:height, :width] * mask


def bounding_box(mask):
    """Returns the top, left, bottom and right of the True pixels of a mask (H, W)."""
    rows = mask.any(1).nonzero()
    columns = mask.any(0).nonzero()
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
