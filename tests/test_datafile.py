import functools
import gzip
import hashlib
import shutil
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import datafile

RAW_DIR = datafile.DATA_DIR / "MNIST" / "raw"


@pytest.fixture(scope="module")
def loaders():
    return datafile.get_loaders()


def fingerprints(images):
    """One integer an image that two different images do not share."""
    pixels = (images * datafile.STD + datafile.MEAN).mul(255).round().to(torch.int64).flatten(1)
    weights = torch.randint(2**40, (784,), generator=torch.Generator().manual_seed(0))
    return (pixels * weights).sum(1)


def test_images_are_what_torchvisions_transforms_give(loaders):
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    expected = datasets.MNIST(datafile.DATA_DIR, train=False, transform=transform)
    images, labels = zip(*loaders[2], strict=True)
    assert torch.equal(torch.cat(images), torch.stack([image for image, _ in expected]))
    assert torch.equal(torch.cat(labels), expected.targets)


def test_loaders_are_dataloaders_of_the_promised_sizes_and_types(loaders):
    assert all(isinstance(loader, DataLoader) for loader in loaders)
    assert [len(loader.dataset) for loader in loaders] == [55_000, 5_000, 10_000]
    assert [len(loader) for loader in loaders] == [430, 5, 10]
    images, labels = next(iter(loaders[0]))
    assert (images.shape, images.dtype) == ((128, 1, 28, 28), torch.float32)
    assert (labels.shape, labels.dtype) == ((128,), torch.int64)


def test_an_epoch_is_every_training_image_once_and_no_validation_image(loaders):
    train_loader, validation_loader, _ = loaders
    batches = [(fingerprints(images), labels) for images, labels in train_loader]
    assert [len(labels) for _, labels in batches] == [128] * 429 + [88]
    trained, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    held_out = torch.cat([fingerprints(images) for images, _ in validation_loader])
    assert len(trained.unique()) == 55_000 and len(held_out.unique()) == 5_000

    everything, everything_labels = datafile.read_split(RAW_DIR, "train")
    expected = fingerprints(datafile.normalize(everything))
    assert torch.equal(torch.cat([trained, held_out]).sort()[0], expected.sort()[0])
    label_of = dict(zip(expected.tolist(), everything_labels.tolist(), strict=True))
    assert labels.tolist() == [label_of[image] for image in trained.tolist()]


def test_order_changes_with_the_epoch_and_repeats_with_the_seed(loaders):
    def epoch(loader):
        return torch.cat([labels for _, labels in loader])

    first, again, other = (datafile.get_loaders(seed=seed) for seed in (3, 3, 4))
    epochs = [epoch(first[0]), epoch(first[0])]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], epoch(again[0])) and torch.equal(epochs[1], epoch(again[0]))
    assert torch.equal(first[1].dataset.tensors[0], again[1].dataset.tensors[0])
    assert not torch.equal(first[1].dataset.tensors[0], other[1].dataset.tensors[0])


def test_a_batch_is_one_indexing_operation(loaders):
    class Indexing(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += "aten.index" in str(function) or "aten.select" in str(function)
            return function(*args, **(kwargs or {}))

    with Indexing() as indexing:
        for _ in loaders[0]:
            pass
    assert indexing.calls == 2 * len(loaders[0])  # images and labels


@pytest.mark.parametrize("size", [0, 60_000, -1])
def test_validation_size_must_leave_images_on_both_sides(size):
    with pytest.raises(ValueError, match="validation_size"):
        datafile.get_loaders(validation_size=size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def cut_header(path):
    path.write_bytes(path.read_bytes()[:6])


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes(), 1))


def lie_about_count(path):
    content = bytearray(path.read_bytes())
    content[4:8] = (59_999).to_bytes(4, "big")
    path.write_bytes(content)


def swap_with_test_set(path):
    shutil.copy(RAW_DIR / path.name.replace("train", "t10k"), path)


def swap_with_other_kind(path):
    other = "labels-idx1" if "images" in path.name else "images-idx3"
    shutil.copy(RAW_DIR / f"train-{other}-ubyte", path)


def replace_with_text(path):
    path.write_text("<html>404 Not Found</html>")


def replace_with_folder(path):
    path.unlink()
    path.mkdir()


BREAKS = {
    truncate: "bytes instead of",
    lengthen: "bytes instead of",
    empty: "empty",
    cut_header: "shape",
    compress: "gunzip",
    lie_about_count: "shape",
    swap_with_test_set: "shape",
    swap_with_other_kind: "magic number",
    replace_with_text: "magic number",
    replace_with_folder: "directory",
}


@pytest.fixture
def copied_data(tmp_path):
    shutil.copytree(RAW_DIR, tmp_path / "MNIST" / "raw")
    return tmp_path


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_a_broken_file_is_named_with_what_is_wrong(copied_data, name, damage):
    path = copied_data / "MNIST" / "raw" / name
    damage(path)
    with pytest.raises((ValueError, OSError)) as caught:
        datafile.get_loaders(data_dir=copied_data)
    assert str(path) in str(caught.value) and BREAKS[damage] in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_a_label_over_nine_is_an_error(copied_data):
    path = copied_data / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(ValueError, match="t10k-labels.* 10"):
        datafile.get_loaders(data_dir=copied_data)


def test_missing_files_that_cannot_be_downloaded_are_named_with_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody answers there
    with pytest.raises(OSError) as caught:
        datafile.get_loaders(data_dir=tmp_path)
    message = str(caught.value)
    assert all(name in message for name in datafile.SHAPES) and str(tmp_path / "MNIST" / "raw") in message
    assert "\n" not in message


def test_missing_files_are_downloaded_where_a_mirror_answers(tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    resources = []
    for name in datafile.SHAPES:
        compressed = gzip.compress((RAW_DIR / name).read_bytes(), 1)
        (mirror / f"{name}.gz").write_bytes(compressed)
        resources.append((f"{name}.gz", hashlib.md5(compressed).hexdigest()))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=mirror)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        loaders = datafile.get_loaders(data_dir=tmp_path / "new")
        server.shutdown()
    assert [len(loader.dataset) for loader in loaders] == [55_000, 5_000, 10_000]


def test_the_default_folder_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(datafile.get_loaders()[2].dataset) == 10_000


def test_augmented_images_keep_their_shape_their_background_and_their_seed(loaders):
    images = loaders[2].dataset.tensors[0][:256]
    torch.manual_seed(0)
    augmented = datafile.augment(images)
    assert augmented.shape == images.shape and augmented.dtype == images.dtype
    assert not torch.equal(augmented, images)
    assert augmented.min() >= images.min() - 1e-5 and augmented.max() <= images.max() + 1e-5
    torch.manual_seed(0)
    assert torch.equal(datafile.augment(images), augmented)
    # Every image is moved on its own: equal images come out different.
    same = datafile.augment(images[:1].expand(8, -1, -1, -1))
    assert len({fingerprint.item() for fingerprint in fingerprints(same)}) == 8


@pytest.fixture
def few_images(tmp_path, monkeypatch):
    """A folder with the first 200 training images, and the bytes of its two files by their names."""
    raw_dir = datafile.DATA_DIR / "MNIST" / "raw"
    contents = {}
    for name, size in ("train-images-idx3-ubyte", 784), ("train-labels-idx1-ubyte", 1):
        shape = (200, *datafile.SHAPES[name][1:])
        monkeypatch.setitem(datafile.SHAPES, name, shape)
        header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
        content = (raw_dir / name).read_bytes()[4 + 4 * len(shape) :][: 200 * size]
        contents[name] = header + content
    return tmp_path, contents


@st.composite
def damage(draw, contents):
    """One file's name and what stands in it instead of its bytes; never the same bytes."""
    name, other = draw(st.permutations(sorted(contents)))
    content = bytearray(contents[name])
    kind = draw(st.sampled_from(["header", "label", "cut", "longer", "swapped", "gzip", "any"]))
    if kind == "header":
        content[draw(st.integers(0, 7 if "labels" in name else 15))] ^= draw(st.integers(1, 255))
    elif kind == "label":
        name = "train-labels-idx1-ubyte"
        content = bytearray(contents[name])
        content[draw(st.integers(8, len(content) - 1))] = draw(st.integers(10, 255))
    elif kind == "cut":
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif kind == "longer":
        content += draw(st.binary(min_size=1, max_size=100))
    elif kind == "swapped":
        content = contents[other]
    elif kind == "gzip":
        content = gzip.compress(content)
    else:
        content = draw(st.binary(max_size=300))
    return name, bytes(content)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_sentence_that_names_it(few_images, data):
    folder, contents = few_images
    name, content = data.draw(damage(contents))
    for each, whole in contents.items():
        (folder / each).write_bytes(content if each == name else whole)
    with pytest.raises(ValueError) as caught:
        datafile.read_split(folder, "train")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_few_images_are_read_where_nothing_is_damaged(few_images):
    folder, contents = few_images
    for each, whole in contents.items():
        (folder / each).write_bytes(whole)
    assert len(datafile.read_split(folder, "train")[0]) == 200
