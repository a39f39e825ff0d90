"""MNIST: from the IDX files on disk to batches of normalised tensors on the training device.

The whole data set is 70,000 images of 784 bytes, so it is read, checked and normalised once and
kept on the device as one tensor; a batch is one indexing operation on it.

    train_loader, validation_loader, test_loader = get_loaders(device="cuda")
"""

import functools
import math
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import grid_sample, interpolate
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import datasets

DATA_DIR = Path(__file__).resolve().parent / "data"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
MEAN, STD = 0.1307, 0.3081  # of the training images' pixels, as fractions of 255
EVALUATION_BATCH = 1_000
UPSTROKES = 0.1  # of the training ones, the share that `add_upstrokes` changes


class DataError(ValueError):
    """The data set's files are missing, or are not what their names say."""


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


def read_idx(path, dimensions):
    """Reads an IDX file of unsigned bytes, whose header must agree with the size of the file.

    The format (http://yann.lecun.com/exdb/mnist/): big-endian 32-bit words, first the magic number
    (0x0800 for unsigned bytes, plus the number of dimensions), then each dimension, then the bytes.

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        DataError: the file is not of this format; the message names it.
        OSError: the file cannot be read.
    """
    content = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        del content[file.readinto(content) :]
    magic, start = 0x0800 + dimensions, 4 + 4 * dimensions
    if not content:
        raise DataError(f"{path} is empty")
    if content[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is compressed: decompress it with gunzip")
    if content[:4] != magic.to_bytes(4, "big"):
        raise DataError(
            f"{path} does not start with the magic number {magic} of an IDX file of "
            f"{'images' if dimensions == 3 else 'labels'} but with the bytes '{content[:4].hex(' ')}'"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    size = start + math.prod(shape)
    if len(content) != size:
        announced = " x ".join(map(str, shape))
        raise DataError(
            f"{path} announces {announced} bytes of data, but has {len(content):,} bytes, not {size:,}"
        )
    return torch.frombuffer(content, dtype=torch.uint8)[start:].view(shape)


def read_split(raw_dir, prefix):
    """Reads and checks one of MNIST's two sets, `prefix` being "train" or "t10k".

    Returns:
        images, uint8 (N, 28, 28), 0 for the background to 255 for ink, and labels, int64 (N,), 0-9.

    Raises:
        DataError: a file is not what its name says; the message names the file.
        OSError: a file cannot be read.
    """
    image_path, label_path = raw_dir / f"{prefix}-images-idx3-ubyte", raw_dir / f"{prefix}-labels-idx1-ubyte"
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1).long()
    if images.shape[1:] != (28, 28) or not len(images):
        raise DataError(
            f"{image_path} has the shape {tuple(images.shape)}: it must hold images of 28 x 28 pixels"
        )
    if len(images) != len(labels):
        raise DataError(f"{image_path} has {len(images):,} images, but {label_path} {len(labels):,} labels")
    if labels.max() > 9:
        raise DataError(f"{label_path} holds the label {labels.max()}: labels are the digits 0 to 9")
    return images, labels


def download(data_dir):
    """Has torchvision download the MNIST files to `data_dir`/MNIST/raw; DataError where it cannot."""
    raw_dir = Path(data_dir) / "MNIST" / "raw"
    try:
        raw_dir.mkdir(parents=True, exist_ok=True)
        # In a folder of their own first, so that what is in `data_dir` neither stops nor suffers from it.
        with tempfile.TemporaryDirectory(dir=raw_dir) as folder:
            datasets.MNIST(folder, download=True)
            for name in FILES:
                if not (raw_dir / name).exists():
                    (Path(folder) / "MNIST" / "raw" / name).replace(raw_dir / name)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the MNIST files are not in {raw_dir} and could not be downloaded ({reason}): "
            f"put {', '.join(FILES)} there"
        ) from error


def normalize(images):
    """uint8 (N, 28, 28) to float32 (N, 1, 28, 28), as ToTensor and Normalize((0.1307,), (0.3081,)) do."""
    return images.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)


@functools.cache
def grid_terms(device):
    """Returns what a sampling grid is a sum of, each at 28 x 28 pixels, float32 (28, 784).

    They are x and y from -1 to 1, 1, and the bicubic weights of a grid of 5 x 5 displacements.
    """
    axis = torch.linspace(-1, 1, 28, device=device) * 27 / 28  # the centres of the pixels
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.eye(5, device=device)[None, None]
    weights = interpolate(points, (5, 28), mode="bicubic", align_corners=True)[0, 0]
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]).flatten(1), torch.kron(weights, weights)])


def augment(images):
    """Deforms every image on its own, within what leaves a digit the same digit.

    Rotation up to 12 degrees, scale up to 12 % in width and in height, slant up to 0.15 and shift up
    to 1 pixel, each either way and drawn uniformly. To these comes an elastic deformation: a grid of 5 x 5
    displacements, drawn from a normal distribution with a standard deviation of 0.6 pixels in x and in y,
    is interpolated to a smooth displacement of every pixel. After P. Simard et al., "Best practices for
    convolutional neural networks applied to visual document analysis", ICDAR 2003.
    Takes and returns normalised images, float32 (N, 1, 28, 28); the generator is their device's default.
    """
    draw = torch.rand(6, len(images), device=images.device) * 2 - 1
    angle, slant = draw[0] * math.radians(12), draw[3] * 0.15
    width, height = 1 + draw[1:3] * 0.12
    x, y = draw[4:] * (1 / 14)  # half a side is 1
    cosine, sine = angle.cos(), angle.sin()
    affine = torch.stack([width * cosine, width * (slant - sine), x, height * sine, height * cosine, y])
    elastic = torch.randn(2, len(images), 25, device=images.device) * (0.6 / 14)
    # Where each pixel comes from, as one product: `affine_grid` and `interpolate` take a CPU far longer.
    grid = torch.cat([affine.view(2, 3, -1).mT, elastic], 2) @ grid_terms(images.device)
    grid = grid.view(2, -1, 28, 28).permute(1, 2, 3, 0)
    background = -MEAN / STD  # what comes in from outside the image
    return grid_sample(images - background, grid, align_corners=False).add_(background)


def add_upstrokes(ones, generator):
    """Gives each of these ones the upstroke with which much of Europe writes a 1.

    MNIST's writers hardly wrote it, and a net that was trained on their ones often reads it as a 7. The
    stroke runs from the top of the stem down to the left, as thick as the stem, 0.3 to 0.65 of the digit's
    height long and 35 to 60 degrees below the horizontal, all of it then slanted as the stem is. Takes and
    returns uint8 (N, 28, 28); `generator`, on the CPU, draws lengths and angles.
    """
    ink = ones / 255
    mass = ink.sum((1, 2), keepdim=True).clamp(min=1)
    right = torch.arange(28)
    down = right[:, None]

    def mean(values):
        return (ink * values).sum((1, 2), keepdim=True) / mass

    x, y = right - mean(right), down - mean(down)
    slant = mean(x * y) / mean(y * y).clamp(min=1)  # of the stem: pixels to the right a row
    rows = (ink > 0.5).any(2, keepdim=True)
    height, top = rows.sum(1, keepdim=True), rows.int().argmax(1, keepdim=True)
    radius = mass / height.clamp(min=1) / (1 + slant**2).sqrt() / 2
    # Each pixel, and the end of the stroke, as seen from its beginning at the top of the stem.
    x, y = x - slant * (top + radius - mean(down)), down - top - radius
    length, angle = torch.rand(2, len(ones), 1, 1, generator=generator)
    length, angle = height * (0.3 + 0.35 * length), torch.deg2rad(35 + 25 * angle)
    end_y = length * angle.sin()
    end_x = slant * end_y - length * angle.cos()
    along = ((x * end_x + y * end_y) / (end_x**2 + end_y**2).clamp(min=1)).clamp(0, 1)
    distance = torch.hypot(x - along * end_x, y - along * end_y)
    return ink.maximum((radius + 0.5 - distance).clamp(0, 1)).mul(255).round().byte()


def split(labels, validation_size, fold, generator):
    """Draws, as `get_loaders` says, which images to train on and which to validate with.

    Returns:
        The indices of both, int64, in an order that is drawn as well; one of them is empty where the size is
        out of range.
    """
    order = torch.randperm(len(labels), generator=generator)
    if not fold:
        n = min(max(len(order) - validation_size, 0), len(order))
        return order[:n], order[n:]
    order = order[labels[order].argsort(stable=True)]  # digit by digit, so that each fold gets its share
    held_out = torch.arange(len(order)) % fold[1] == fold[0] - 1
    return order[~held_out], order[held_out]


def get_loaders(
    batch_size=128, validation_size=None, seed=0, device="cpu", data_dir=DATA_DIR, fold=None, upstrokes=False
):
    """Returns (train_loader, validation_loader, test_loader) over the MNIST data set.

    Each is a `torch.utils.data.DataLoader` whose batches are pairs of images, float32
    (N, 1, 28, 28), and labels, int64 (N,), on `device`. The seed draws the validation images out of
    the training images, and the order of every training epoch. Training batches are shuffled, of
    `batch_size` images; the other two go in order, in batches of 1,000. Any data set in files of
    MNIST's form and names will do, of whatever size.

    MNIST: Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist/.

    Args:
        batch_size: training images a batch, at least 1.
        validation_size: how many training images are held out; default: a twelfth, of MNIST's 60,000
            images 5,000.
        seed: an int; one seed always gives the same split and the same order.
        device: a `torch.device` or its name.
        data_dir: folder that holds MNIST/raw; files missing from it are downloaded.
        fold: for cross-validation, a pair (k, K), k from 1 to K: the seed draws K stratified folds,
            and fold k is the validation set, whatever `validation_size`.
        upstrokes: give one in ten training ones an upstroke (`add_upstrokes`), the same in each epoch.

    Raises:
        DataError: files are missing and cannot be downloaded, a file is not what its name says, or no
            image would be left to train on or to validate with.
        OSError: a file cannot be read.
    """
    raw_dir = Path(data_dir) / "MNIST" / "raw"
    if not all((raw_dir / name).exists() for name in FILES):
        download(data_dir)
    images, labels = read_split(raw_dir, "train")
    test_images, test_labels = read_split(raw_dir, "t10k")

    generator = torch.Generator().manual_seed(seed)
    if validation_size is None:
        validation_size = len(images) // 12
    training, validation = split(labels, validation_size, fold, generator)
    if not (len(training) and len(validation)):
        raise DataError(
            f"{raw_dir} has {len(images):,} training images: with {len(validation):,} of them for validation "
            "(validation_size), none are left to train on or to validate with"
        )
    if upstrokes:
        ones = training[labels[training] == 1]
        ones = ones[: round(UPSTROKES * len(ones))]  # they are in an order that was drawn
        images[ones] = add_upstrokes(images[ones], generator)

    def in_order(images, labels):
        batches = [slice(i, i + EVALUATION_BATCH) for i in range(0, len(images), EVALUATION_BATCH)]
        dataset = TensorDataset(normalize(images.to(device)), labels.to(device))
        return DataLoader(dataset, sampler=batches, batch_size=None)

    # batch_size=None switches the loader's own batching off: each index tensor is a whole batch.
    training_set = Batches(normalize(images[training].to(device)), labels[training].to(device))
    shuffled = ShuffledIndices(len(training), batch_size, generator, device)
    train_loader = DataLoader(training_set, sampler=shuffled, batch_size=None)
    return train_loader, in_order(images[validation], labels[validation]), in_order(test_images, test_labels)
