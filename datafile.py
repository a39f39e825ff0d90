"""MNIST: from the IDX files on disk to batches of normalised tensors on the training device.

The whole data set is 70,000 images of 784 bytes, so it is read, checked and normalised once and
kept on the device as one tensor; a batch is one indexing operation on it.

    train_loader, validation_loader, test_loader = get_loaders(device="cuda")
"""

import math
import struct
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageStat
from torch.nn.functional import grid_sample, interpolate, max_pool2d
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

DATA_DIR = Path(__file__).resolve().parent / "data"
SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
MEAN, STD = 0.1307, 0.3081  # of the training images' pixels, as fractions of 255
EVALUATION_BATCH = 1_000


class ShuffledIndices(Sampler):
    """Yields an epoch's batches as index tensors: a new permutation of `range(n)` every epoch.

    The permutation is drawn on the CPU, so that it is the same on every device, and moved once.

    Args:
        n: number of images.
        batch_size: images a batch; the last batch of an epoch holds what is left.
        generator: source of the permutations; its state is all that the next epochs depend on.
        device: where the index tensors (int64) live.
    """

    def __init__(self, n, batch_size, generator, device):
        self.n, self.batch_size, self.generator, self.device = n, batch_size, generator, device

    def __iter__(self):
        permutation = torch.randperm(self.n, generator=self.generator)
        yield from permutation.to(self.device).split(self.batch_size)

    def __len__(self):
        return -(-self.n // self.batch_size)


class Batches(TensorDataset):
    """A `TensorDataset` that takes an index tensor for a whole batch, and copies its images row by row."""

    def __getitem__(self, index):
        # Half the time of tensor[index], which works out the place of each pixel.
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


def check_file(path, shape):
    """Raises ValueError unless the file is an IDX file of unsigned bytes of exactly this shape.

    The format (http://yann.lecun.com/exdb/mnist/): big-endian 32-bit words, first the magic number
    (0x0800 for unsigned bytes, plus the number of dimensions), then each dimension, then the bytes.
    """
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
    size = len(header) + torch.Size(shape).numel()
    with path.open("rb") as file:
        found = file.read(len(header))
    if not found:
        raise ValueError(f"{path} is empty")
    if found[:2] == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed: decompress it with gunzip")
    if found[:4] != header[:4]:
        raise ValueError(
            f"{path} does not start with the magic number {0x0800 + len(shape)} of an IDX file of "
            f"{'images' if len(shape) == 3 else 'labels'} but with the bytes '{found[:4].hex(' ')}'"
        )
    if found != header:
        dimensions = struct.unpack(f">{len(found) // 4}I", found[: len(found) // 4 * 4])[1:]
        raise ValueError(f"{path} announces the shape {dimensions} instead of {shape}")
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}")


def read_split(raw_dir, prefix):
    """Reads and checks one of MNIST's two sets, `prefix` being "train" or "t10k".

    Returns:
        images, uint8 (N, 28, 28), 0 for the background to 255 for ink, and labels, int64 (N,), 0-9.

    Raises:
        ValueError: a file is not what its name says; the message names the file.
        OSError: a file cannot be read.
    """
    image_path, label_path = raw_dir / f"{prefix}-images-idx3-ubyte", raw_dir / f"{prefix}-labels-idx1-ubyte"
    for path in image_path, label_path:
        check_file(path, SHAPES[path.name])
    images = datasets.mnist.read_image_file(image_path)
    labels = datasets.mnist.read_label_file(label_path)
    if labels.max() > 9:
        raise ValueError(f"{label_path} holds the label {labels.max()}: labels are the digits 0 to 9")
    return images, labels


def download(data_dir):
    """Has torchvision download the MNIST files to `data_dir`/MNIST/raw; OSError where it cannot."""
    try:
        datasets.MNIST(data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the MNIST files are not in {Path(data_dir) / 'MNIST' / 'raw'} and could not be downloaded "
            f"({str(error).splitlines()[0]}): put {', '.join(SHAPES)} there"
        ) from error


def normalize(images):
    """uint8 (N, 28, 28) to float32 (N, 1, 28, 28), as ToTensor and Normalize((0.1307,), (0.3081,)) do."""
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)


def augment(images):
    """Deforms every image on its own, within what leaves a digit the same digit.

    Rotation up to 12 degrees, scale up to 12 % in width and in height, slant up to 0.15 and shift up
    to 1 pixel, each either way and drawn evenly by the default generator of the images' device.
    Takes and returns normalised images, float32 (N, 1, 28, 28).
    """
    draw = torch.rand(6, len(images), 1, 1, device=images.device) * 2 - 1
    angle, slant = draw[0] * math.radians(12), draw[3] * 0.15
    width, height = 1 + draw[1:3] * 0.12
    x, y = draw[4:] * (1 / 14)  # half a side is 1
    cosine, sine = angle.cos(), angle.sin()
    # Where each pixel comes from, the same bits as `affine_grid` in a tenth of its time on a CPU.
    right = torch.linspace(-1, 1, 28, device=images.device) * 27 / 28
    down = right[:, None]
    x = width * cosine * right + width * (slant - sine) * down + x
    y = height * sine * right + height * cosine * down + y
    grid = torch.stack([x, y], 3)
    background = -MEAN / STD  # what comes in from outside the image
    return grid_sample(images - background, grid, align_corners=False) + background


def get_loaders(batch_size=128, validation_size=5_000, seed=0, device="cpu", data_dir=DATA_DIR, fold=None):
    """Returns (train_loader, validation_loader, test_loader) over the MNIST data set.

    Each is a `torch.utils.data.DataLoader` whose batches are pairs of images, float32
    (N, 1, 28, 28), and labels, int64 (N,), on `device`. The seed draws the validation images out of
    the 60,000 training images, and the order of every training epoch. Training batches are
    shuffled, of `batch_size` images; the other two go in order, in batches of 1,000.

    MNIST: Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist/.

    Args:
        batch_size: training images a batch, at least 1.
        validation_size: images held out of the training images, 1 to 59,999.
        seed: an int; one seed always gives the same split and the same order.
        device: a `torch.device` or its name.
        data_dir: folder that holds MNIST/raw; files missing from it are downloaded.
        fold: for cross-validation, a pair (k, K), k from 1 to K: the seed deals the training images to
            K folds, each digit evenly, and fold k is the validation set, whatever `validation_size`.

    Raises:
        OSError: files are missing and cannot be downloaded, or cannot be read.
        ValueError: a file is not what its name says, or `validation_size` is out of range.
    """
    if not 0 < validation_size < SHAPES["train-labels-idx1-ubyte"][0]:
        raise ValueError(f"validation_size is {validation_size}, which leaves none to train or to validate")
    raw_dir = Path(data_dir) / "MNIST" / "raw"
    if not all((raw_dir / name).exists() for name in SHAPES):
        download(data_dir)
    images, labels = read_split(raw_dir, "train")
    test_images, test_labels = read_split(raw_dir, "t10k")

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    if fold:
        order = order[labels[order].argsort(stable=True)]  # to be dealt digit by digit
        held_out = torch.arange(len(order)) % fold[1] == fold[0] - 1
        order = torch.cat([order[~held_out], order[held_out]])
        validation_size = int(held_out.sum())
    images, labels = normalize(images[order].to(device)), labels[order].to(device)
    n = len(images) - validation_size
    training_set = Batches(images[:n], labels[:n])
    validation_set = TensorDataset(images[n:], labels[n:])
    test_set = TensorDataset(normalize(test_images.to(device)), test_labels.to(device))

    def in_order(dataset):
        batches = [slice(i, i + EVALUATION_BATCH) for i in range(0, len(dataset), EVALUATION_BATCH)]
        return DataLoader(dataset, sampler=batches, batch_size=None)

    # batch_size=None switches the loader's own batching off: each index tensor is a whole batch.
    shuffled = ShuffledIndices(n, batch_size, generator, device)
    train_loader = DataLoader(training_set, sampler=shuffled, batch_size=None)
    return train_loader, in_order(validation_set), in_order(test_set)


def read_drawing(path):
    """Reads a picture of one digit and brings it into the form of MNIST's images.

    The paper may be lighter or darker than the ink, unevenly lit, coloured or transparent. As
    MNIST's own, the digit fills a box of 20 x 20 pixels, antialiased, and its centre of mass is the
    centre of the image (Y. LeCun et al., "Gradient-based learning applied to document recognition",
    Proc. IEEE 86(11), 1998).

    Returns:
        uint8 (28, 28), 0 for the background to 255 for ink.

    Raises:
        ValueError: the file is no picture, is too large, or there is nothing in it.
        OSError: the file cannot be read.
    """
    picture = read_picture(path)
    ink = find_ink(picture)
    if ink is None:
        raise ValueError(f"{path} is empty: there is nothing on its background")
    # A second, closer look at the part where the digit is.
    scale = max(picture.size) / max(ink.shape)
    top, left, bottom, right = (round(scale * edge) for edge in box(ink, margin=4))
    closer = find_ink(picture.crop((left, top, min(right, picture.width), min(bottom, picture.height))))
    ink = ink if closer is None else closer
    top, left, bottom, right = box(ink, margin=0)
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


def read_picture(path):
    """Returns a picture file as a grey `PIL.Image` of up to 1,024 pixels a side; raises as `read_drawing`."""
    if not Path(path).is_file():
        raise OSError(f"{path} is no file" if Path(path).exists() else f"there is no file {path}")
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
        raise ValueError(f"{path} is too large: it has over {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{path} is not a picture that can be read") from error
    except Exception as error:  # there is no end to what a damaged file can raise
        raise ValueError(f"{path} is not a picture that can be read") from error
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
    terms = torch.stack([x**0, x, y, x * x, x * y, y * y], 2).view(-1, 6)
    edge = ((x.abs() > 0.9) | (y.abs() > 0.9)).flatten()
    weight = edge.float()
    for _ in range(20):
        root = weight.sqrt()[:, None]
        surface = torch.linalg.lstsq(root * terms, root * grey.view(-1, 1)).solution
        difference = (terms @ surface).view_as(grey) - grey
        noise = 1.5 * difference.flatten()[weight > 0].abs().median().clamp(min=1)
        weight = 1 / (1 + (difference.flatten() / (2 * noise)) ** 2) ** 2
    if (difference**3).sum() < 0:
        difference = -difference
    difference = difference.clamp(min=0)
    level = otsu(difference)
    full = difference[difference > level].median() if (difference > level).any() else torch.tensor(0.0)
    if full < max(8, 4 * noise):
        return None
    low = max(0.2 * full, min(2 * noise, 0.5 * full))
    ink = ((difference - low) / (full - low)).clamp(0, 1)
    return ink * connected(ink > 0.3, ink)


def otsu(values):
    """The threshold between two classes of values: N. Otsu, IEEE Trans. SMC 9(1), 1979."""
    values = values.flatten().sort().values
    n = torch.arange(1, len(values))
    lower, total = values.cumsum(0)[:-1], values.sum()
    between = n * (len(values) - n) * (lower / n - (total - lower) / (len(values) - n)) ** 2
    return values[between.argmax()]


def connected(mask, ink):
    """Returns the parts of a bool mask (H, W) that have at least a tenth of the ink that the largest has."""
    numbers = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    while True:
        spread = max_pool2d(numbers[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, numbers):
            break
        numbers = spread
    sums = torch.zeros(mask.numel() + 1).index_add_(0, numbers.flatten().long(), (ink * mask).flatten())
    sums[0] = 0
    return (sums >= sums.max() / 10)[numbers.long()] & mask


def box(ink, margin):
    """Returns the pixels at top, left, bottom and right of the ink, with a margin inside the picture."""
    edges = []
    for dimension, length in enumerate(ink.shape):
        found = (ink > 0.3).any(1 - dimension).nonzero()
        edges.append((max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right
