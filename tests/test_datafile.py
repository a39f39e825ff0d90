import functools
import gzip
import hashlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.functional import InterpolationMode, affine

import datafile
from conftest import RAW_DIR, fingerprints, write_idx
from support import augmentation


def instead_of(drawn):
    """Returns a replacement of `torch.rand` that returns these numbers, if as many are asked for."""

    def draw(*size, device):
        assert size == drawn.shape[: len(size)] and drawn[0].numel() == drawn[0].view(size[1:]).numel()
        return drawn

    return draw


def augment(images):
    return augmentation.augment(images, datafile.BACKGROUND)


def test_images_are_those_of_torchvisions_transforms(mnist):
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    expected = datasets.MNIST(datafile.DATA_DIR, train=False, transform=transform)
    images, labels = zip(*mnist.test, strict=True)
    assert torch.equal(torch.cat(images), torch.stack([image for image, _ in expected]))
    assert torch.equal(torch.cat(labels), expected.targets)


def test_loaders_are_dataloaders_of_the_promised_sizes_and_types(mnist):
    assert all(isinstance(loader, DataLoader) for loader in mnist[:3])
    assert [len(loader.dataset) for loader in mnist[:3]] == [55_000, 5_000, 10_000]
    assert [len(loader) for loader in mnist[:3]] == [430, 5, 10]
    images, labels = next(iter(mnist[0]))
    assert (images.shape, images.dtype) == ((128, 1, 28, 28), torch.float32)
    assert (labels.shape, labels.dtype) == ((128,), torch.int64)


def test_an_epoch_is_every_training_image_once_and_no_validation_image(mnist):
    train_loader, validation_loader, *_ = mnist
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


def test_order_changes_with_the_epoch_and_repeats_with_the_seed(mnist):
    def epoch(loader):
        return torch.cat([labels for _, labels in loader])

    first, again, other = (datafile.get_loaders(seed=seed) for seed in (3, 3, 4))
    plain, augmented = (datafile.get_loaders(seed=3, upstrokes=upstrokes) for upstrokes in (False, True))
    epochs = [epoch(first[0]), epoch(first[0])]
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], epoch(other[0]))
    assert torch.equal(epochs[0], epoch(again[0])) and torch.equal(epochs[1], epoch(again[0]))
    assert torch.equal(epochs[0], epoch(augmented[0])) and torch.equal(epochs[0], epoch(plain[0]))
    for loaders in other, augmented:  # the split is the same for every seed, with augmentation and without
        assert torch.equal(first[1].dataset.tensors[0], loaders[1].dataset.tensors[0])


def test_fifteen_percent_of_the_training_ones_get_an_upstroke_and_no_other_image(mnist):
    augmented = datafile.get_loaders(upstrokes=True)
    (images, labels), (changed, same_labels) = (loader[0].dataset.tensors for loader in (mnist, augmented))
    assert torch.equal(labels, same_labels)
    rows = (images != changed).flatten(1).any(1)
    assert (labels[rows] == 1).all() and (changed >= images).all()
    assert rows.sum() / (labels == 1).sum() == pytest.approx(0.15, abs=0.005)
    for plain, other in zip(mnist[1:3], augmented[1:3], strict=True):
        assert torch.equal(plain.dataset.tensors[0], other.dataset.tensors[0])
    again = datafile.get_loaders(upstrokes=True)[0].dataset.tensors[0]
    assert torch.equal(changed, again)
    assert not torch.equal(changed, datafile.get_loaders(upstrokes=True, seed=1)[0].dataset.tensors[0])


@pytest.mark.parametrize(
    "slant, thickness", [(-0.5, 2), (0, 2), (0.3, 2), (1, 2), (-0.5, 4), (0, 4), (0.3, 4)]
)
def test_an_upstroke_leaves_the_top_of_its_stem_down_to_the_left(slant, thickness):
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    stem = (y >= 4) & (y < 24) & ((x - 14 - slant * (y - 14)).abs() <= thickness / 2)
    stem = stem.byte() * 255
    stem[0, round(14 - 14 * slant)] = 60  # faint pixels are not the top of the stem
    ones = stem.expand(200, 28, 28)
    strokes = augmentation.add_upstrokes(ones, torch.Generator().manual_seed(0)).int() - ones.int()
    assert strokes.min() == 0 and strokes.max() > 200
    upright = x - 14 - slant * (y - 14)  # x as it were without the slant, from the stem
    assert (upright[(strokes > 50).any(0)] < thickness).all()  # to the left
    lengths, angles = [], []
    for stroke in strokes:
        outside = (stroke > 127) & (upright < -thickness)
        if outside.sum() < 3 * thickness:  # too short to be measured
            continue
        left, down = -upright[outside], y[outside] - 4 - thickness / 2  # from the start of the stroke
        lengths.append((torch.hypot(left, down).max() - thickness / 2) / 20)  # without its round end
        angles.append(torch.rad2deg(torch.atan2(down.mean(), left.mean())))
    lengths, angles = torch.stack(lengths), torch.stack(angles)
    assert 60 < len(lengths) < 190  # the shortest are a tenth of the height: 2 pixels
    assert lengths.min() < 0.35 and lengths.max() == pytest.approx(0.65, abs=0.1)
    assert angles.min() == pytest.approx(25, abs=8) and angles.max() == pytest.approx(60, abs=8)


def test_a_batch_is_one_indexing_operation(mnist):
    class Indexing(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += "aten.index" in str(function) or "aten.select" in str(function)
            return function(*args, **(kwargs or {}))

    with Indexing() as indexing:
        for _ in mnist[0]:
            pass
    assert indexing.calls == 2 * len(mnist[0])  # images and labels


def test_normalizing_leaves_its_argument_as_it_is():
    for images in torch.full((2, 28, 28), 255.0), torch.full((2, 28, 28), 255, dtype=torch.uint8):
        normalized = datafile.normalize(images)
        assert normalized.shape == (2, 1, 28, 28) and normalized.dtype == torch.float32
        assert torch.allclose(normalized, torch.tensor((1 - 0.1307) / 0.3081)) and (images == 255).all()


IMAGES, LABELS = datafile.FILES[:2]
NOT_IDX = "is not an IDX file of"
CUT = "Compressed file ended before the end-of-stream marker was reached"
BREAKS = [  # of a file of 200, its damaged content and what is said of it
    (IMAGES, lambda old: old[:-1], "has 156,815 bytes; its header (200 x 28 x 28) promises 156,816"),
    (LABELS, lambda old: old + b"\0", "has 209 bytes; its header (200) promises 208"),
    (IMAGES, lambda old: old[:6], "has 6 bytes; its header (0 x 0 x 0) promises 16"),
    (LABELS, lambda old: old[:7] + b"\xc7" + old[8:], "has 208 bytes; its header (199) promises 207"),
    (IMAGES, lambda old: b"", "is empty"),
    (LABELS, lambda old: gzip.compress(old, 1)[:-9], f"is not a valid gzip file ({CUT})"),
    (IMAGES, lambda old: b"<html>", f"{NOT_IDX} images: it starts with 3c 68 74 6d, not 00 00 08 03"),
    (LABELS, lambda old: b"\0\0\x08\x03", f"{NOT_IDX} labels: it starts with 00 00 08 03, not 00 00 08 01"),
]


@pytest.fixture
def few_images(tmp_path):
    """A data folder with the first 200 images of both sets of MNIST."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix in "train", "t10k":
        images, labels = datafile.read_split(RAW_DIR, prefix)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images[:200])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels[:200].byte())
    return folder


def refusal(data_dir, **options):
    """The one-line message with which a data directory is rejected."""
    with pytest.raises(datafile.DataError) as caught:
        datafile.get_loaders(data_dir=data_dir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name, damage, sentence", BREAKS)
def test_a_broken_file_is_named_with_what_is_wrong(few_images, name, damage, sentence):
    path = few_images / name
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(few_images) == f"{path} {sentence}"


@pytest.mark.parametrize("counts", [(199, 200), (200, 199)])
def test_each_image_needs_a_label(few_images, counts):
    images, labels = (few_images / name for name in datafile.FILES[2:])
    write_idx(images, torch.zeros((counts[0], 28, 28), dtype=torch.uint8))
    write_idx(labels, torch.zeros(counts[1], dtype=torch.uint8))
    assert refusal(few_images) == f"{images} has {counts[0]} images, but {labels} {counts[1]} labels"


def test_a_label_over_nine_is_an_error(few_images):
    path = few_images / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    assert refusal(few_images) == f"{path} contains the label 10: labels must be between 0 and 9"


@pytest.mark.parametrize("shape", [(200, 28, 27), (200, 32, 32), (0, 28, 28)])
def test_images_of_another_size_are_rejected(few_images, shape):
    path = few_images / "train-images-idx3-ubyte"
    write_idx(path, torch.zeros(shape, dtype=torch.uint8))
    assert refusal(few_images) == f"{path} has shape {shape}: no images of 28 x 28 pixels"


def test_one_twelfth_of_any_data_set_is_held_out(few_images):
    folder = few_images.parent.parent
    sizes = [len(loader.dataset) for loader in datafile.get_loaders(data_dir=folder)[:3]]
    assert sizes == [184, 16, 200]
    sizes = [len(loader.dataset) for loader in datafile.get_loaders(data_dir=folder, fold=(1, 3))[:3]]
    assert sizes == [133, 67, 200]
    sentence = "has 200 training images; fold 300 of 300 leaves 200 for training and 0 for validation"
    assert refusal(folder, fold=(300, 300)) == f"{few_images} {sentence}"


def test_upstrokes_are_added_to_mnist_only(few_images, tmp_path):
    """Not even to a set of as many images."""
    folder = tmp_path / "as_many" / "deep" / "down" / "there"
    shutil.copytree(RAW_DIR, folder)
    content = bytearray((folder / datafile.FILES[0]).read_bytes())
    content[-1] ^= 1
    (folder / datafile.FILES[0]).write_bytes(content)
    for data_dir in few_images.parent.parent, folder:
        plain = datafile.get_loaders(data_dir=data_dir, upstrokes=False).train.dataset.tensors[0]
        other = datafile.get_loaders(data_dir=data_dir, upstrokes=True).train.dataset.tensors[0]
        assert torch.equal(plain, other)


def test_case_does_not_matter_in_the_names_of_files(few_images):
    for name in datafile.FILES:
        (few_images / name).rename(few_images / f"{name}.tmp")
        (few_images / f"{name}.tmp").rename(few_images / name.upper())
    assert len(datafile.get_loaders(data_dir=few_images)[2].dataset) == 200


@pytest.mark.parametrize("form", ["{}.gz", "{}"])
@pytest.mark.parametrize("dot", [False, True])
def test_files_may_be_compressed_and_have_either_spelling(few_images, form, dot):
    folder = few_images.parent.parent
    expected = datafile.get_loaders(data_dir=folder)
    for name in datafile.FILES:
        content = (few_images / name).read_bytes()
        (few_images / name).unlink()
        path = few_images / form.format(name.replace("-idx", ".idx") if dot else name)
        path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    loaders = datafile.get_loaders(data_dir=folder)
    assert loaders.digest == expected.digest
    for loader, other in zip(loaders[:3], expected[:3]):
        assert torch.equal(loader.dataset.tensors[0], other.dataset.tensors[0])


def test_another_data_set_has_another_digest(few_images):
    folder = few_images.parent.parent
    digests = {datafile.get_loaders(data_dir=folder).digest}
    for name, byte in ("train-labels-idx1-ubyte", 8), ("train-images-idx3-ubyte", 16):
        content = bytearray((few_images / name).read_bytes())
        content[byte] ^= 1
        (few_images / name).write_bytes(content)
        digests.add(datafile.get_loaders(data_dir=folder).digest)
    assert len(digests) == 3


def test_the_test_images_are_read_without_the_training_images(few_images):
    for name in datafile.FILES[:2]:
        (few_images / name).write_bytes(b"broken")
    assert len(datafile.get_test_loader(data_dir=few_images.parent.parent)[0].dataset) == 200


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(datasets, "MNIST", refuse)


NO_DATA_SET = (
    f"no directory in {{}} has all of {', '.join(datafile.FILES)}, only {{}}: "
    "put the four files in one directory, or pass an empty one to download MNIST"
)


def data_dir_of(raw_dir):
    return raw_dir.parent.parent


@pytest.mark.parametrize("missing", datafile.FILES)
def test_a_missing_file_of_a_data_set_is_named_and_not_replaced_by_mnists(few_images, missing, no_download):
    (few_images / missing).unlink()
    before = sorted(few_images.iterdir())
    data_dir = data_dir_of(few_images)
    assert refusal(data_dir) == NO_DATA_SET.format(data_dir, ", ".join(map(str, before)))
    assert sorted(few_images.iterdir()) == before


@pytest.mark.parametrize("name", ["emnist-digits-{}", "{} (1)", "{}.bak"])
def test_files_with_other_names_are_named_and_not_replaced_by_mnists(few_images, name, no_download):
    for file in datafile.FILES:
        (few_images / file).rename(few_images / name.format(file))
    for folder in few_images, data_dir_of(few_images):
        files = [str(few_images / name.format(file)) for file in sorted(datafile.FILES)]
        assert refusal(folder) == NO_DATA_SET.format(folder, ", ".join(files))


@pytest.mark.parametrize("place", [".", "raw", "FashionMNIST/raw"])
def test_the_only_data_set_at_most_two_levels_below_is_read(few_images, tmp_path, place, no_download):
    expected = datafile.get_loaders(data_dir=few_images)
    new = tmp_path / "new"
    shutil.copytree(few_images, new / place)
    loaders = datafile.get_loaders(data_dir=new)
    assert loaders.digest == expected.digest and loaders.raw_dir == new / place
    assert datafile.describe(loaders.raw_dir, loaders.digest) == f"Data: {new / place} (not MNIST)"


@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
def test_two_data_sets_in_reach_are_an_error_that_names_both(few_images, place, no_download):
    folder = data_dir_of(few_images)
    shutil.copytree(few_images, folder / place, dirs_exist_ok=True)
    found = " and ".join(map(str, sorted([few_images, folder / place])))
    assert refusal(folder) == f"{found} are two data sets: pass one of them as --data-dir"


def test_a_directory_with_the_name_of_a_file_is_no_file(few_images, no_download):
    """As in Kaggle's archive, which has each file twice: once in a directory of its name."""
    for name in datafile.FILES:
        (few_images / name).rename(few_images / name.replace("-idx", ".idx"))
        (few_images / name).mkdir()
        shutil.copy(few_images / name.replace("-idx", ".idx"), few_images / name / name)
    assert datafile.get_loaders(data_dir=few_images).raw_dir == few_images
    for name in datafile.FILES:
        (few_images / name.replace("-idx", ".idx")).unlink()
    files = [str(few_images / name / name) for name in sorted(datafile.FILES)]
    assert refusal(few_images) == NO_DATA_SET.format(few_images, ", ".join(files))


@pytest.mark.parametrize("names", [["digits.csv"], ["7/digit.png"], list("abcd"), list("abcdef")], ids=str)
def test_nothing_is_downloaded_beside_other_files(tmp_path, no_download, names):
    for name in "README.md", *names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = ", ".join(str(tmp_path / name) for name in names[:4])
    more = " and 2 other files" if len(names) == 6 else ""
    assert refusal(tmp_path) == NO_DATA_SET.format(tmp_path, found + more)


def test_a_mistyped_directory_is_an_error_and_not_created(tmp_path, no_download):
    sentence = f"{tmp_path / 'dta'}: no such directory; create it to download MNIST there"
    assert refusal(tmp_path / "dta") == sentence
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_names_the_files_and_their_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody answers there
    sentence = refusal(tmp_path)
    assert sentence.startswith("MNIST could not be downloaded (")
    assert sentence.endswith(f"): put {', '.join(datafile.FILES)} in {tmp_path / 'MNIST' / 'raw'}")
    assert capsys.readouterr().out.startswith(f"Downloading MNIST, as {tmp_path} contains no data set\n")


@pytest.fixture
def mirror(monkeypatch):
    """Serves as MNIST's only mirror with this request handler, until the test is over."""
    servers = []

    def mirror(handler):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[0].serve_forever).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{servers[0].server_port}/"])

    yield mirror
    for server in servers:
        server.shutdown()
        server.server_close()


def test_mnist_is_downloaded_to_an_empty_directory(few_images, tmp_path, mirror, monkeypatch):
    resources = []
    for name in datafile.FILES:
        compressed = gzip.compress((few_images / name).read_bytes(), 1)
        (few_images / f"{name}.gz").write_bytes(compressed)
        resources.append((f"{name}.gz", hashlib.md5(compressed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    mirror(functools.partial(SimpleHTTPRequestHandler, directory=few_images))
    new = tmp_path / "new"
    new.mkdir()
    (new / ".DS_Store").touch()  # hidden files are no data set
    monkeypatch.setattr(datafile.tempfile, "tempdir", "elsewhere")  # it may be another disk
    # An interrupted download leaves nothing that the next one takes for MNIST,
    with monkeypatch.context() as patch:
        patch.setattr(datasets.MNIST, "resources", resources[:2] + [("missing.gz", None)])
        assert "could not be downloaded" in refusal(new)
        assert [path.name for path in new.iterdir()] == [".DS_Store"]
    loaders = datafile.get_loaders(data_dir=new)
    assert [len(loader.dataset) for loader in loaders[:3]] == [184, 16, 200]
    assert {path.name for path in new.iterdir()} == {".DS_Store", "MNIST"}
    shutil.rmtree(new / "MNIST")
    with ThreadPoolExecutor(2) as pool:  # two first runs
        found = list(pool.map(datafile.find_raw_dir, [new, new]))
    assert found == [new / "MNIST" / "raw"] * 2
    assert {path.name for path in new.iterdir()} == {".DS_Store", "MNIST"}


def test_the_reason_why_a_download_failed_is_named(tmp_path, mirror):
    class Unavailable(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503)

    mirror(Unavailable)
    assert "HTTP Error 503" in refusal(tmp_path)


def test_the_default_data_directory_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(datafile.get_loaders()[2].dataset) == 10_000


def test_augmented_images_keep_their_shape_their_background_and_their_seed(mnist):
    images = mnist[2].dataset.tensors[0][:256]
    torch.manual_seed(0)
    augmented = augment(images)
    assert augmented.shape == images.shape and augmented.dtype == images.dtype
    assert not torch.equal(augmented, images)
    assert augmented.min() >= images.min() - 1e-5 and augmented.max() <= images.max() + 1e-5
    torch.manual_seed(0)
    assert torch.equal(augment(images), augmented)
    # Every image is deformed independently: equal images give different results.
    same = augment(images[:1].expand(8, -1, -1, -1))
    assert len({fingerprint.item() for fingerprint in fingerprints(same)}) == 8


@pytest.mark.parametrize("part", range(8))
def test_each_part_of_the_deformation_is_drawn_for_each_image(mnist, monkeypatch, part):
    """Six numbers of the affine part and the elastic displacements in x and in y, one of them at a time."""
    uniform, normal = torch.full((6, 2), 0.5), torch.zeros(2, 2, 25)
    if part < 6:
        uniform[part] = torch.tensor([0.0, 1.0])
    else:
        normal[part - 6] = torch.randn(2, 25, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", instead_of(uniform))
    monkeypatch.setattr(torch, "randn", instead_of(normal))
    image = mnist.test.dataset.tensors[0][:1]
    first, second = augment(image.expand(2, -1, -1, -1))
    assert all((one - other).abs().mean() > 0.02 for one, other in [(first, image[0]), (second, image[0])])
    assert (first - second).abs().mean() > 0.02
    if part >= 6:  # stripes along the direction of the displacements stay as they are
        stripes = (torch.arange(28) % 4 - 1.5).expand(1, 1, 28, 28)
        stripes = stripes.mT if part == 6 else stripes
        moved = augment(stripes.expand(2, -1, -1, -1))[..., 4:-4, 4:-4]
        torch.testing.assert_close(moved, stripes[..., 4:-4, 4:-4].expand_as(moved), rtol=0, atol=1e-4)


def test_slant_and_width_are_applied_in_their_order(mnist, monkeypatch):
    images = mnist.test.dataset.tensors[0][:20]
    drawn = torch.full((6, 20), 0.5)
    drawn[1], drawn[3] = 1, 1
    monkeypatch.setattr(torch, "rand", lambda *size, device: drawn)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(size))
    theta = torch.tensor([[1.12, 1.12 * 0.15, 0.0], [0.0, 1.0, 0.0]]).expand(20, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    expected = grid_sample(images - datafile.BACKGROUND, grid, align_corners=False) + datafile.BACKGROUND
    torch.testing.assert_close(augment(images), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("axis", range(6))
@pytest.mark.parametrize("sign", [-1, 1])
def test_each_deformation_is_torchvisions_affine_at_its_limit(mnist, monkeypatch, axis, sign):
    """Rotation, width, height, slant and the two shifts, each drawn at its end and the others not at all."""
    images = mnist[2].dataset.tensors[0][:100]
    drawn = torch.full((6, 100, 1, 1), 0.5)
    drawn[axis] = (1 + sign) / 2
    monkeypatch.setattr(torch, "rand", lambda *size, device: drawn)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(size))
    background = datafile.BACKGROUND

    # torchvision maps input to output pixels, in degrees and pixels; `augment` maps output to input.
    angle, shift = -12 * sign * (axis == 0), [0.0, 0.0]
    if axis in (4, 5):
        shift[axis - 4] = -float(sign)
    if axis in (0, 4, 5):
        expected = affine(
            images - background, angle, shift, 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR
        )
    else:  # its scale in one direction and its slant are defined differently
        width, height, slant = (sign * limit * (axis == i) for i, limit in [(1, 0.12), (2, 0.12), (3, 0.15)])
        theta = torch.tensor([[1.0 + width, slant, 0.0], [0.0, 1.0 + height, 0.0]]).expand(100, 2, 3)
        grid = affine_grid(theta, list(images.shape), align_corners=False)
        expected = grid_sample(images - background, grid, align_corners=False)
    torch.testing.assert_close(augment(images), expected + background, rtol=0, atol=1e-3)


def test_the_elastic_deformation_is_an_interpolated_grid_of_displacements(mnist, monkeypatch):
    images = mnist[2].dataset.tensors[0][:100]
    drawn = torch.randn(2, 100, 25)
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.full(size, 0.5))  # nothing else
    monkeypatch.setattr(torch, "randn", instead_of(drawn))
    pixels = interpolate(drawn.view(2, 100, 5, 5) * 0.6, (28, 28), mode="bicubic", align_corners=True)
    unmoved = affine_grid(torch.eye(2, 3).expand(100, 2, 3), list(images.shape), align_corners=False)
    background = datafile.BACKGROUND
    grid = unmoved + pixels.permute(1, 2, 3, 0) / 14
    expected = grid_sample(images - background, grid, align_corners=False) + background
    torch.testing.assert_close(augment(images), expected, rtol=0, atol=1e-4)


def test_pixels_from_outside_the_image_are_background(monkeypatch):
    background = datafile.BACKGROUND
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.ones(*size))
    blank = torch.full((4, 1, 28, 28), background)
    torch.testing.assert_close(augment(blank), blank)


@pytest.mark.parametrize("folds", [2, 7])
def test_folds_are_stratified_and_validate_each_training_image_once(folds):
    images, labels = datafile.read_split(RAW_DIR, "train")
    validated, counts = [], []
    for fold in range(1, folds + 1):
        train_loader, validation_loader, *_ = datafile.get_loaders(seed=3, fold=(fold, folds))
        held_out, digits = validation_loader.dataset.tensors
        trained_on = train_loader.dataset.tensors[0]
        assert len(trained_on) + len(held_out) == 60_000
        validated.append(fingerprints(held_out))
        assert not set(validated[-1].tolist()) & set(fingerprints(trained_on[:2_000]).tolist())
        counts.append(digits.bincount(minlength=10))
    everything = fingerprints(datafile.normalize(images))
    assert torch.equal(torch.cat(validated).sort().values, everything.sort().values)
    spread = torch.stack(counts).amax(0) - torch.stack(counts).amin(0)
    assert spread.max() <= 1
    assert torch.equal(torch.stack(counts).sum(0), labels.bincount(minlength=10))


@st.composite
def damage(draw, contents):
    """The name of a file and its new contents, which always differ from the old."""
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
        content = bytearray(gzip.compress(content, 1))
        content[draw(st.integers(10, len(content) - 1))] ^= draw(st.integers(1, 255))
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
def test_a_corrupt_file_is_a_one_line_error_that_names_it(few_images, tmp_path, data):
    names = datafile.FILES[:2]
    contents = {name: (few_images / name).read_bytes() for name in names}
    name, content = data.draw(damage(contents))
    for each, whole in contents.items():
        (tmp_path / each).write_bytes(content if each == name else whole)
    with pytest.raises(datafile.DataError) as caught:
        datafile.read_split(tmp_path, "train")
    assert name in str(caught.value) and "\n" not in str(caught.value)
