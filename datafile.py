"""MNIST: from the IDX files on disk to batches of normalised tensors on the training device.

The whole data set is 70,000 images of 784 bytes, so it is read, checked and normalised once and
kept on the device as one tensor; a batch is one indexing operation on it.

    train_loader, validation_loader, test_loader = get_loaders(device="cuda")
"""

import math
import struct
from pathlib import Path

import torch
from torch.nn.functional import grid_sample
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import datasets

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
    limits = torch.tensor([math.radians(12), 0.12, 0.12, 0.15, 1 / 14, 1 / 14])  # half a side is 1
    draw = torch.rand(6, len(images), device=images.device) * 2 - 1
    angle, width, height, slant, x, y = (draw * limits.to(images.device)[:, None])[:, :, None, None]
    cosine, sine, width, height = angle.cos(), angle.sin(), 1 + width, 1 + height
    # Where each pixel comes from, the same bits as `affine_grid` in a tenth of its time on a CPU.
    right = torch.linspace(-1, 1, 28, device=images.device) * 27 / 28
    down = right[:, None]
    x = width * cosine * right + width * (slant - sine) * down + x
    y = height * sine * right + height * cosine * down + y
    grid = torch.stack([x, y], 3)
    background = -MEAN / STD  # what comes in from outside the image
    return grid_sample(images - background, grid, align_corners=False) + background


def get_loaders(batch_size=128, validation_size=5_000, seed=0, device="cpu", data_dir=DATA_DIR):
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
