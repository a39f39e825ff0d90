"""MNIST: from the IDX files on disk to batches of normalized tensors on the training device.

The whole data set is 70,000 images of 784 bytes, so it is read, checked and normalized once per run and
kept on the device, one tensor per set; a batch is a single indexing operation.

    loaders = get_loaders(device="cuda")
    for images, labels in loaders.train: ...
"""

import gzip
import hashlib
import math
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision import datasets

from support.augmentation import UPSTROKES, add_upstrokes
from support.exits import RunError

DATA_DIR = Path(__file__).resolve().parent / "data"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
TRAINING_DIGEST = "6ec8b2bda93d92536a92256ebf1a467ebbbf3d2091d83fd0148536a007e75caa"  # MNIST's: `get_digest`
TEST_DIGEST = "6bfdba1d84ed554183b4828e8b6c889f7fd8244ce69e5c88134d85558440207b"
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
    raw_dir: Path  # the directory with the files
    digest: str  # SHA-256 of the training labels and images


class ShuffledBatchSampler(Sampler):
    """Yields the batches of an epoch as index tensors: a new permutation of `range(n)` in every epoch.

    The permutation is drawn on the CPU, so that it is the same for every device, and moved once. PyTorch's
    `BatchSampler(RandomSampler(...))` yields lists of integers and takes 2.5 times as long.

    Args:
        n: number of images.
        batch_size: batch size; the last batch may be smaller.
        generator: generator used for shuffling; its state determines all following epochs.
        device: device of the index tensors (int64).
    """

    def __init__(self, n, batch_size, generator, device):
        self.n = n
        self.batch_size = batch_size
        self.generator = generator
        self.device = device

    def __iter__(self):
        permutation = torch.randperm(self.n, generator=self.generator)
        yield from permutation.to(self.device).split(self.batch_size)

    def __len__(self):
        return math.ceil(self.n / self.batch_size)


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
    content = bytearray(path.read_bytes())
    try:
        if content[:2] == b"\x1f\x8b":
            content = bytearray(gzip.decompress(content))
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is not a valid gzip file ({error})") from error
    if not content:
        raise DataError(f"{path} is empty")
    magic = (0x0800 + dimensions).to_bytes(4, "big")
    if content[:4] != magic:
        kind = "images" if dimensions == 3 else "labels"
        found = content[:4].hex(" ")
        raise DataError(f"{path} is not an IDX file of {kind}: it starts with {found}, not {magic.hex(' ')}")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    size = start + math.prod(shape)
    if len(content) != size:
        shape = " x ".join(map(str, shape))
        raise DataError(f"{path} has {len(content):,} bytes; its header ({shape}) promises {size:,}")
    return torch.frombuffer(content, dtype=torch.uint8)[start:].view(shape)


def read_split(raw_dir, prefix):
    """Reads and checks one of MNIST's two sets: `prefix` is "train" or "t10k".

    Returns:
        images, uint8 (N, 28, 28), 0 for the background to 255 for ink, and labels, int64 (N,), 0-9.

    Raises:
        DataError: a file is invalid; the message names it.
        OSError: a file cannot be read.
    """
    files = find_files(raw_dir)
    image_path = files[f"{prefix}-images-idx3-ubyte"]
    label_path = files[f"{prefix}-labels-idx1-ubyte"]
    images = read_idx(image_path, 3)
    labels = read_idx(label_path, 1).long()
    if images.shape[1:] != (28, 28) or not len(images):
        raise DataError(f"{image_path} has shape {tuple(images.shape)}: no images of 28 x 28 pixels")
    if len(images) != len(labels):
        raise DataError(f"{image_path} has {len(images):,} images, but {label_path} {len(labels):,} labels")
    if labels.max() > 9:
        raise DataError(f"{label_path} contains the label {labels.max()}: labels must be between 0 and 9")
    return images, labels


def find_files(folder):
    """Returns {name: path} of the files in a directory that have a name in `FILES`.

    Case does not matter; a suffix .gz and ".idx" in place of "-idx" are allowed.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        name = path.name.lower().removesuffix(".gz").replace(".idx", "-idx")
        if name in FILES and path.is_file():
            found.setdefault(name, path)
    return found


def find_raw_dir(data_dir):
    """Returns the directory with the four files: `data_dir`, or one at most two levels below it.

    If `data_dir` is empty, downloads MNIST to `data_dir`/MNIST/raw.

    Raises:
        DataError: there are two such directories, or none and the directory is not empty; the directory does
            not exist; or the download fails.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such directory; create it to download MNIST there")
    files = []
    for pattern in "*", "*/*", "*/*/*":
        files += [path for path in sorted(data_dir.glob(pattern)) if path.is_file()]
    folders = dict.fromkeys(path.parent for path in files)
    complete = [folder for folder in folders if len(find_files(folder)) == len(FILES)]
    if len(complete) > 1:
        found = " and ".join(map(str, complete))
        raise DataError(f"{found} are two data sets: pass one of them as --data-dir")
    if complete:
        return complete[0]
    others = [str(path) for path in files if path.name[0] != "." and path.name != "README.md"]
    if others:
        found = f"no directory in {data_dir} has all of {', '.join(FILES)}, only {', '.join(others[:4])}"
        more = f" and {len(others) - 4} other files" if len(others) > 4 else ""
        advice = "put the four files in one directory, or pass an empty one to download MNIST"
        raise DataError(f"{found}{more}: {advice}")
    return download(data_dir)


def download(data_dir):
    """Downloads MNIST to `data_dir`/MNIST/raw and returns that path. Raises DataError if that fails."""
    raw_dir = data_dir / "MNIST" / "raw"
    print(f"Downloading MNIST, as {data_dir} contains no data set")
    try:
        # An interrupted download leaves nothing in `raw_dir`, and two at once do not share a directory.
        with tempfile.TemporaryDirectory(prefix=".download", dir=data_dir) as temporary:
            datasets.MNIST(temporary, download=True)
            raw_dir.parent.mkdir(exist_ok=True)
            if not raw_dir.exists():  # another run was faster
                (Path(temporary) / "MNIST" / "raw").rename(raw_dir)
    except (OSError, RuntimeError) as error:
        reason = f"MNIST could not be downloaded ({' '.join(str(error).split())})"
        raise DataError(f"{reason}: put {', '.join(FILES)} in {raw_dir}") from error
    return raw_dir


def describe(raw_dir, digest):
    """Returns a line that says which data was read, given the digest of the training or the test set."""
    name = "MNIST" if digest in (TRAINING_DIGEST, TEST_DIGEST) else "not MNIST"
    return f"Data: {raw_dir} ({name})"


def get_digest(images, labels):
    """Returns the SHA-256 of uint8 images and int64 labels, in hexadecimal."""
    digest = hashlib.sha256(labels.numpy())
    digest.update(images.numpy())
    return digest.hexdigest()


def normalize(images):
    """Converts uint8 (N, 28, 28) to float32 (N, 1, 28, 28): (pixel / 255 - MEAN) / STD, as in torchvision.

    The result is a new tensor.
    """
    return images.unsqueeze(1).to(torch.float32, copy=True).div_(255).sub_(MEAN).div_(STD)


def split(labels, fold):
    """Splits the training images into a training and a validation set, the same for every seed.

    See `get_loaders`.

    Returns:
        Indices of both sets, int64: shuffled, or, with `fold`, sorted by digit and shuffled within each.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if not fold:
        n = len(order) - len(order) // 12
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
    """Returns a `DataLoader` over the test images only, and a line that says which they are."""
    raw_dir = find_raw_dir(data_dir)
    images, labels = read_split(raw_dir, "t10k")
    return make_loader(images, labels, device), describe(raw_dir, get_digest(images, labels))


def get_loaders(batch_size=128, seed=0, device="cpu", data_dir=DATA_DIR, fold=None, upstrokes=False):
    """Returns the MNIST data set as `Loaders`: three `DataLoader`s, generator, directory and digest.

    Each loader is a `torch.utils.data.DataLoader` whose batches are pairs of images, float32
    (N, 1, 28, 28), and labels, int64 (N,), on `device`. Training batches are shuffled and have `batch_size`
    images; the other two loaders go in order, in batches of 1,000. One twelfth of the training images (5,000
    of MNIST's) is held out for validation. Any data set in MNIST's file format and naming works, compressed
    or not.

    MNIST: Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist/.

    Args:
        batch_size: training batch size, at least 1.
        seed: an int; determines the order of the training images and the upstrokes.
        device: a `torch.device` or its name.
        data_dir: directory that contains MNIST/raw, or the files themselves: see `find_raw_dir`.
        fold: for cross-validation, a pair (k, K) with k from 1 to K: fold k of K stratified folds is the
            validation set.
        upstrokes: draw an upstroke on 15% of the training 1s (`add_upstrokes`), the same in each epoch. Only
            if the training set is MNIST's: in other data sets, label 1 need not be the digit 1.

    Raises:
        DataError: files are missing and cannot be downloaded, a file is invalid, or the training or
            validation set would be empty.
        OSError: a file cannot be read.
    """
    raw_dir = find_raw_dir(data_dir)
    images, labels = read_split(raw_dir, "train")
    digest = get_digest(images, labels)
    training, validation = split(labels, fold)
    if not (len(training) and len(validation)):
        held_out = f"fold {fold[0]} of {fold[1]}" if fold else "one twelfth for validation"
        sizes = f"{len(training):,} for training and {len(validation):,} for validation"
        raise DataError(f"{raw_dir} has {len(images):,} training images; {held_out} leaves {sizes}")
    if upstrokes and digest == TRAINING_DIGEST:
        ones = training[labels[training] == 1]
        ones = ones[: round(UPSTROKES * len(ones))]  # the 1s are in random order (with folds, too)
        images[ones] = add_upstrokes(images[ones], torch.Generator().manual_seed(seed))

    # batch_size=None disables automatic batching: each index tensor is a whole batch.
    training_set = BatchDataset(normalize(images[training].to(device)), labels[training].to(device))
    generator = torch.Generator().manual_seed(seed)
    shuffled = ShuffledBatchSampler(len(training), batch_size, generator, device)
    test_images, test_labels = read_split(raw_dir, "t10k")
    return Loaders(
        DataLoader(training_set, sampler=shuffled, batch_size=None),
        make_loader(images[validation], labels[validation], device),
        make_loader(test_images, test_labels, device),
        generator,
        raw_dir,
        digest,
    )
