"""MNIST: from the IDX files on disk to batches of normalized tensors on the training device.

The whole data set is 70,000 images of 784 bytes, so it is read, checked and normalized once and
kept on the device as one tensor; a batch is a single indexing operation.

    loaders = get_loaders(device="cuda")
    for images, labels in loaders.train: ...
"""

import gzip
import hashlib
import math
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import datasets

from support.augmentation import UPSTROKES, add_upstrokes
from support.process import RunError

DATA_DIR = Path(__file__).resolve().parent / "data"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
MNIST_DIGEST = "6ec8b2bda93d92536a92256ebf1a467ebbbf3d2091d83fd0148536a007e75caa"
MEAN, STD = 0.1307, 0.3081  # of the training images' pixels, as fractions of 255
BACKGROUND = -MEAN / STD  # a normalized pixel without ink
EVALUATION_BATCH = 1_000


class DataError(RunError):
    """A data file is missing or invalid."""


class Loaders(NamedTuple):
    """The data of a run: see `get_loaders`."""

    train: DataLoader
    validation: DataLoader
    test: DataLoader
    generator: torch.Generator
    digest: str  # SHA-256 of the training labels and images


class ShuffledBatchSampler(Sampler):
    """Yields the batches of an epoch as index tensors: a new permutation of `range(n)` in every epoch.

    The permutation is drawn on the CPU, so that it is the same for every device, and moved once.

    Args:
        n: number of images.
        batch_size: batch size; the last batch may be smaller.
        generator: generator used for shuffling; its state determines all following epochs.
        device: device of the index tensors (int64).
    """

    def __init__(self, n, batch_size, generator, device):
        self.n, self.batch_size, self.generator, self.device = n, batch_size, generator, device

    def __iter__(self):
        permutation = torch.randperm(self.n, generator=self.generator)
        yield from permutation.to(self.device).split(self.batch_size)

    def __len__(self):
        return -(-self.n // self.batch_size)


class BatchDataset(TensorDataset):
    """A `TensorDataset` whose index is a tensor that selects a whole batch."""

    def __getitem__(self, index):
        # About twice as fast as `tensor[index]`, which computes an address per element.
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


def read_idx(path, dimensions):
    """Reads an IDX file of unsigned bytes, which may be compressed with gzip, and checks its header.

    The format (http://yann.lecun.com/exdb/mnist/): big-endian 32-bit words, first the magic number
    (0x0800 for unsigned bytes, plus the number of dimensions), then each dimension, then the bytes.

    Returns:
        uint8, of the shape given in the header.

    Raises:
        DataError: the file does not have this format; the message names it.
        OSError: the file cannot be read.
    """
    content = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        del content[file.readinto(content) :]
    try:
        if content[:2] == b"\x1f\x8b":
            content = bytearray(gzip.decompress(content))
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is not a valid gzip file ({error})") from error
    magic, start = 0x0800 + dimensions, 4 + 4 * dimensions
    if not content:
        raise DataError(f"{path} is empty")
    if content[:4] != magic.to_bytes(4, "big"):
        raise DataError(
            f"{path} does not start with the magic number {magic} of an IDX file of "
            f"{'images' if dimensions == 3 else 'labels'} but with the bytes '{content[:4].hex(' ')}'"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    size = start + math.prod(shape)
    if len(content) != size:
        shape = " x ".join(map(str, shape))
        raise DataError(f"{path} has {len(content):,} bytes, not the {size:,} of {shape} bytes of data")
    return torch.frombuffer(content, dtype=torch.uint8)[start:].view(shape)


def read_split(raw_dir, prefix):
    """Reads and checks one of MNIST's two sets: `prefix` is "train" or "t10k".

    Returns:
        images, uint8 (N, 28, 28), 0 for the background to 255 for ink, and labels, int64 (N,), 0-9.

    Raises:
        DataError: a file is invalid; the message names it.
        OSError: a file cannot be read.
    """
    files, _ = find_files(raw_dir)
    image_path, label_path = files[f"{prefix}-images-idx3-ubyte"], files[f"{prefix}-labels-idx1-ubyte"]
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1).long()
    if images.shape[1:] != (28, 28) or not len(images):
        raise DataError(f"{image_path} has shape {tuple(images.shape)}: no images of 28 x 28 pixels")
    if len(images) != len(labels):
        raise DataError(f"{image_path} has {len(images):,} images, but {label_path} {len(labels):,} labels")
    if labels.max() > 9:
        raise DataError(f"{label_path} contains the label {labels.max()}: labels must be between 0 and 9")
    return images, labels


def find_files(folder):
    """Returns a dict from each of `FILES` that a directory contains to its path, and a list of similar names.

    Case does not matter. Files may be compressed (.gz) and may be spelled as in "train-images.idx3-ubyte".
    """
    found, others = {}, []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name.lower().removesuffix(".gz").replace(".idx", "-idx")
        if name in FILES:
            found.setdefault(name, path)
        elif "idx" in name or "ubyte" in name:
            others.append(path.name)
    return found, others


def find_raw_dir(data_dir):
    """Returns the directory with the four files: `data_dir`/MNIST/raw or `data_dir` itself.

    If neither contains a file of a data set, downloads MNIST to the former.

    Raises:
        DataError: the directory does not exist or contains only some of the files, or the download fails.
    """
    data_dir = Path(data_dir)
    raw_dir = data_dir / "MNIST" / "raw"
    for folder in raw_dir, data_dir:
        found, others = find_files(folder)
        missing = [name for name in FILES if name not in found]
        if not missing:
            return folder
        if found or others:
            present = ", ".join([path.name for path in found.values()] + others)
            advice = "rename them, or delete them to download MNIST"
            raise DataError(f"{folder} has {present}, but not {', '.join(missing)}: {advice}")
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such directory; create it to download MNIST there")
    print(f"Downloading MNIST, as {data_dir} contains no data set")
    temporary = data_dir / ".download"  # so that an interrupted download leaves nothing in `raw_dir`
    try:
        datasets.MNIST(temporary, download=True)
        raw_dir.mkdir(parents=True, exist_ok=True)
        for path in (temporary / "MNIST" / "raw").iterdir():
            path.replace(raw_dir / path.name)
    except (OSError, RuntimeError) as error:
        reason = f"MNIST could not be downloaded ({' '.join(str(error).split())})"
        raise DataError(f"{reason}: put {', '.join(FILES)} in {raw_dir}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return raw_dir


def normalize(images):
    """Converts uint8 (N, 28, 28) to float32 (N, 1, 28, 28): (pixel / 255 - MEAN) / STD, as in torchvision.

    The result is a new tensor.
    """
    return images.unsqueeze(1).to(torch.float32, copy=True).div_(255).sub_(MEAN).div_(STD)


def split(labels, validation_size, fold, generator):
    """Splits the training images into a training and a validation set: see `get_loaders`.

    Returns:
        Indices of both sets, int64, shuffled or, with `fold`, sorted by digit. One is empty if
        `validation_size` is out of range.
    """
    order = torch.randperm(len(labels), generator=generator)
    if not fold:
        n = min(max(len(order) - validation_size, 0), len(order))
        return order[:n], order[n:]
    order = order[labels[order].argsort(stable=True)]  # sorted by digit, so that each fold gets its share
    held_out = torch.arange(len(order)) % fold[1] == fold[0] - 1
    return order[~held_out], order[held_out]


def make_loader(images, labels, device):
    """Returns a `DataLoader` over uint8 images (N, 28, 28) and labels (N,), in order, in batches of 1,000."""
    batches = [slice(i, i + EVALUATION_BATCH) for i in range(0, len(images), EVALUATION_BATCH)]
    dataset = TensorDataset(normalize(images.to(device)), labels.to(device))
    return DataLoader(dataset, sampler=batches, batch_size=None)


def get_test_loader(device="cpu", data_dir=DATA_DIR):
    """Returns a `DataLoader` over the test images only: see `get_loaders`."""
    return make_loader(*read_split(find_raw_dir(data_dir), "t10k"), device)


def get_loaders(
    batch_size=128, validation_size=None, seed=0, device="cpu", data_dir=DATA_DIR, fold=None, upstrokes=False
):
    """Returns the MNIST data set as `Loaders`: three `DataLoader`s, generator and digest.

    Each loader is a `torch.utils.data.DataLoader` whose batches are pairs of images, float32
    (N, 1, 28, 28), and labels, int64 (N,), on `device`. The seed determines the validation split and the
    shuffling order. Training batches are shuffled and have `batch_size` images; the other two loaders go in
    order, in batches of 1,000. Any data set in MNIST's file format and naming works, compressed or not.

    MNIST: Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist/.

    Args:
        batch_size: training batch size, at least 1.
        validation_size: number of training images held out for validation; default: one twelfth (5,000
            for MNIST).
        seed: an int; the same seed gives the same split and order.
        device: a `torch.device` or its name.
        data_dir: directory that contains MNIST/raw, or the files themselves. If it contains no data set,
            MNIST is downloaded there.
        fold: for cross-validation, a pair (k, K) with k from 1 to K: the seed determines K stratified
            folds, and fold k is the validation set. `validation_size` is ignored.
        upstrokes: draw an upstroke on 10% of the training 1s (`add_upstrokes`), the same in each epoch. Only
            if the training set is MNIST's: in other data sets, label 1 need not be the digit 1.

    Raises:
        DataError: files are missing and cannot be downloaded, a file is invalid, or the training or
            validation set would be empty.
        OSError: a file cannot be read.
    """
    raw_dir = find_raw_dir(data_dir)
    images, labels = read_split(raw_dir, "train")
    digest = hashlib.sha256(labels.numpy())
    digest.update(images.numpy())
    generator = torch.Generator().manual_seed(seed)
    if validation_size is None:
        validation_size = len(images) // 12
    training, validation = split(labels, validation_size, fold, generator)
    if not (len(training) and len(validation)):
        cause = f"fold {fold[0]} of {fold[1]}" if fold else f"a validation_size of {validation_size:,}"
        sizes = f"{len(training):,} for training and {len(validation):,} for validation"
        raise DataError(f"{raw_dir} has {len(images):,} training images; {cause} leaves {sizes}")
    if upstrokes and digest.hexdigest() == MNIST_DIGEST:
        ones = training[labels[training] == 1]
        ones = ones[: round(UPSTROKES * len(ones))]  # `training` is already shuffled
        images[ones] = add_upstrokes(images[ones], generator)

    # batch_size=None disables automatic batching: each index tensor is a whole batch.
    training_set = BatchDataset(normalize(images[training].to(device)), labels[training].to(device))
    shuffled = ShuffledBatchSampler(len(training), batch_size, generator, device)
    return Loaders(
        DataLoader(training_set, sampler=shuffled, batch_size=None),
        make_loader(images[validation], labels[validation], device),
        make_loader(*read_split(raw_dir, "t10k"), device),
        generator,
        digest.hexdigest(),
    )
