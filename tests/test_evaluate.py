import os
import re
import struct
import sys
import zlib

import pytest
import torch
from PIL import Image

import datafile
import drawings
import evaluate
import models
import train
from models import checkpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a Model_3 after two epochs and a Model_1 after one."""
    folder = tmp_path_factory.mktemp("trained")
    for name, epochs in ("Model_3", 2), ("Model_1", 1):
        train.train(name, train.parse_args(["--output-dir", str(folder), "--epochs", str(epochs)]), 0)
    return folder


def test_scores_are_what_plain_pytorch_gives(run, trained):
    paths = [trained / "best_Model_1.pth", trained / "best_Model_3.pth"]
    output = run("evaluate.py", *paths, "--device", "cpu").stdout
    assert f"{paths[0]}: Model_1, 26,698 parameters\n" in output
    assert f"{paths[1]}: Model_3, 4,506 parameters\n" in output

    images, labels = datafile.get_loaders()[2].dataset.tensors
    outputs = []
    for path in paths:
        model = getattr(models, path.stem[5:])()
        model.load_state_dict(torch.load(path, weights_only=True))
        with torch.no_grad():
            outputs.append(model.eval()(images).softmax(1))
    outputs.append(sum(outputs))
    rows = re.findall(r"Test Accuracy: (.*)% \((\d+) images wrong\)\nRecall of each digit: (.*)\n", output)
    assert len(rows) == 3 and "\nEnsemble of these 2\n" in output
    for (accuracy, wrong, recalls), probabilities in zip(rows, outputs, strict=True):
        right = probabilities.argmax(1) == labels
        assert int(wrong) == pytest.approx((~right).sum().item(), abs=1)  # another batch size, another sum
        assert float(accuracy) == pytest.approx(100 - int(wrong) / 100)
        for digit, recall in re.findall(r"(\d): ([\d.]+)%", recalls):
            expected = 100 * right[labels == int(digit)].float().mean().item()
            assert float(recall) == pytest.approx(expected, abs=0.2)
    assert len(re.findall(r"Latency: [\d.]+ ms an image; throughput: [\d,]+ images/s\n", output)) == 2


def test_a_file_that_is_no_model_is_one_sentence(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 40)
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    poisoned = models.Model_3().state_dict()
    poisoned["1.weight"][0] = torch.nan
    torch.save(poisoned, "nan.pth")
    for name, reason in [
        ("noise.pth", "noise.pth is damaged"),
        ("other.pth", "other.pth does not have the weights of Model_1, Model_2, Model_3"),
        ("nan.pth", "nan.pth: '1.weight' has values that are not finite"),
        ("missing.pth", "there is no file missing.pth"),
        (str(trained / "last_Model_1.pth"), "is the state of a training run"),
    ]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", name])
        with pytest.raises(SystemExit) as caught:
            evaluate.main()
        sentence = caught.value.code
        assert sentence.startswith("evaluate.py: error: ") and reason in sentence and "\n" not in sentence


needs_fonts = pytest.mark.skipif(
    not all((drawings.FONT_FOLDER / font).exists() for font in drawings.FONTS),
    reason="needs the handwriting fonts: the fonts-... packages in .ci/run",
)


@needs_fonts
def test_nine_of_ten_drawings_are_read(trained, tmp_path):
    drawn = drawings.draw_all(tmp_path)
    assert len(drawn) >= 100
    model = checkpoint.load(trained / "best_Model_3.pth")
    assert drawings.accuracy(model, drawn) >= 0.9


def seven(size=200, ink=0, paper=255, mode="L"):
    """A 7 of two strokes."""
    image = Image.new("L", (size, size), paper)
    thickness = max(1, size // 15)
    pixels = image.load()
    for step in range(size // 2):
        for offset in range(thickness):
            pixels[size // 4 + step, size // 4 + offset] = ink
            pixels[size * 3 // 4 - step // 2 - offset, size // 4 + step] = ink
    return image.convert(mode)


def test_a_drawing_takes_the_form_of_mnist(tmp_path):
    for name, picture in {
        "dark.png": seven(),
        "light.png": seven(ink=200, paper=20),
        "faint.png": seven(ink=200, paper=230),
        "small.png": seven(30),
        "large.png": seven(1500),
        "black_and_white.png": seven(1500, mode="1"),
        "palette.gif": seven(mode="P"),
        "print.jpg": seven(mode="CMYK"),
        "video.tif": seven(mode="YCbCr"),
        "sixteen_bits.png": seven(1500, mode="I").point(lambda value: value * 200 + 1000).convert("I;16"),
    }.items():
        picture.save(tmp_path / name)
        image = datafile.read_drawing(tmp_path / name)
        assert image.shape == (28, 28) and image.dtype == torch.uint8 and image.max() == 255, name
        ink = image.float()
        rows, columns = (ink.sum(dimension).nonzero() for dimension in (1, 0))
        height, width = (int(found[-1] - found[0]) + 1 for found in (rows, columns))
        assert max(height, width) in (19, 20) and 60 < ink.sum() / 255 < 150, name
        place = torch.arange(28.0)
        for dimension in 0, 1:
            centre = float((ink.sum(dimension) * place).sum() / ink.sum())
            assert centre == pytest.approx(13.5, abs=0.6), name


def test_a_picture_without_a_digit_is_empty(tmp_path):
    for picture in [
        Image.new("L", (1, 1)),
        Image.new("L", (1, 3_000)),
        Image.new("LAB", (20, 20)),
        Image.new("RGBA", (50, 50)),
        Image.effect_noise((300, 300), 60),
        Image.linear_gradient("L"),
    ]:
        picture.save(tmp_path / "nothing.tif")
        with pytest.raises(ValueError, match="is empty"):
            datafile.read_drawing(tmp_path / "nothing.tif")


def test_transparent_paper_is_no_ink(tmp_path):
    expected = None
    for name, colour in ("black", (0, 0, 0)), ("white", (255, 255, 255)), ("red", (200, 30, 30)):
        picture = Image.new("RGBA", (200, 200), colour)
        picture.putalpha(seven(ink=255, paper=0))
        picture.save(tmp_path / f"{name}.png")
        image = datafile.read_drawing(tmp_path / f"{name}.png").int()
        expected = image if expected is None else expected
        assert (image - expected).abs().max() <= 8, name


def test_a_turned_photograph_is_set_upright(tmp_path):
    upright = seven(mode="RGB")
    upright.save(tmp_path / "upright.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise by whoever shows it
    turned.save(tmp_path / "turned.png", exif=orientation)
    images = [datafile.read_drawing(tmp_path / name).int() for name in ("upright.png", "turned.png")]
    assert (images[0] - images[1]).abs().max() <= 16


def huge_png(width, height):
    """A PNG file of a few bytes that announces a picture of this size."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000)))


def test_pictures_are_read_one_by_one_and_what_is_none_is_one_sentence(run, trained, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    seven().save(folder / "a sêven.png")
    (folder / ".hidden").write_text("not looked at")
    (folder / "blank.png").write_bytes(b"")
    Image.new("L", (100, 100), 255).save(folder / "empty.png")
    (folder / "bomb.png").write_bytes(huge_png(60_000, 60_000))
    (folder / "cut.png").write_bytes((folder / "a sêven.png").read_bytes()[:150])
    (folder / "notes.txt").write_text("7")
    seven(ink=255, paper=0).save(tmp_path / "other.png")
    paths = folder, "missing.png", "other.png"
    model = trained / "best_Model_3.pth"
    process = run("evaluate.py", model, model, "--device", "cpu", "--images", *paths, check=False)
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    assert [re.fullmatch(r"(.*): 7 \([\d.]+%\), else \d \([\d.]+%\)", line)[1] for line in lines] == [
        str(folder / "a sêven.png"),
        "other.png",
    ]
    errors = process.stderr.splitlines()
    for line, (name, reason) in zip(
        errors,
        [
            ("blank.png", "is not a picture that can be read"),
            ("bomb.png", "is too large: it has over "),
            ("cut.png", "is not a picture that can be read"),
            ("empty.png", "is empty: there is nothing on its background"),
            ("notes.txt", "is not a picture that can be read"),
            ("missing.png", "there is no file missing.png"),
        ],
        strict=True,
    ):
        assert line.startswith("evaluate.py: error: ") and name in line and reason in line
    assert run("evaluate.py", model, "--images", "other.png").returncode == 0


def is_small_png(path):
    with Image.open(path) as image:
        return image.format == "PNG" and image.width >= 300 and path.stat().st_size < 200_000


def test_pictures_are_drawn_small(run, trained, small_data, tmp_path):
    seven().save(tmp_path / "seven.png")
    model = trained / "best_Model_1.pth"
    run("evaluate.py", model, trained / "best_Model_3.pth", "--plot", "plots")
    run("evaluate.py", model, "--images", "seven.png", "--plot", "plots")
    options = "--model", "Model_1", "--data-dir", small_data, "--epochs", 2, "--runs", 2
    output = run("tests/train_small.py", *options, "--plot", "plots").stdout
    names = {"confusion", "mistakes", "filters", "saliency", "seen"}
    names |= {"curves_Model_1_seed0", "curves_Model_1_seed1"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == names
    assert all(is_small_png(path) for path in (tmp_path / "plots").iterdir())
    assert "See plots/curves_Model_1_seed0.png\n" in output


def test_without_matplotlib_a_sentence_says_what_to_install(run, trained, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for arguments in ("train.py",), ("evaluate.py", trained / "best_Model_1.pth"):
        process = run(*arguments, "--plot", "plots", env=environment, check=False)
        assert process.returncode == 1 and "Epoch" not in process.stdout
        assert process.stderr == f"{arguments[0]}: error: --plot needs matplotlib: pip install matplotlib\n"
        assert run(arguments[0], "--help", env=environment).returncode == 0
