import struct
import zlib

import fonts
import pytest
import torch
from PIL import Image

from conftest import seven
from support import checkpoint, drawings

needs_fonts = pytest.mark.skipif(
    not all((fonts.FONT_FOLDER / font).exists() for font in fonts.FONTS),
    reason="needs the handwriting fonts: the fonts-... packages in .ci/run",
)


@needs_fonts
def test_nine_of_ten_drawings_are_read(trained, tmp_path):
    """Of the ones with an upstroke, six: after one epoch, a net that has seen none reads three."""
    drawn = fonts.draw_all(tmp_path)
    assert [len(pairs) for pairs in drawn.values()] == [110, 27, 27, 27]
    model = checkpoint.load(trained / "best_Model_3.pth")
    for kind, pairs in drawn.items():
        assert fonts.accuracy(model, pairs) >= (0.6 if "upstroke" in kind else 0.9), kind


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
        image = drawings.read_drawing(tmp_path / name)
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
        with pytest.raises(drawings.DrawingError, match="is empty"):
            drawings.read_drawing(tmp_path / "nothing.tif")


def test_transparent_paper_is_no_ink(tmp_path):
    expected = None
    for name, colour in ("black", (0, 0, 0)), ("white", (255, 255, 255)), ("red", (200, 30, 30)):
        picture = Image.new("RGBA", (200, 200), colour)
        picture.putalpha(seven(ink=255, paper=0))
        picture.save(tmp_path / f"{name}.png")
        image = drawings.read_drawing(tmp_path / f"{name}.png").int()
        expected = image if expected is None else expected
        assert (image - expected).abs().max() <= 8, name


def test_a_turned_photograph_is_set_upright(tmp_path):
    upright = seven(mode="RGB")
    upright.save(tmp_path / "upright.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise by whoever shows it
    turned.save(tmp_path / "turned.png", exif=orientation)
    images = [drawings.read_drawing(tmp_path / name).int() for name in ("upright.png", "turned.png")]
    assert (images[0] - images[1]).abs().max() <= 16


def test_a_stain_beside_the_digit_changes_nothing(tmp_path):
    clean, stained = seven(), seven()
    stained.paste(0, (6, 150, 16, 160))
    images = []
    for picture in clean, stained:
        picture.save(tmp_path / "seven.png")
        images.append(drawings.read_drawing(tmp_path / "seven.png").int())
    assert (images[0] - images[1]).abs().max() <= 16


def test_a_small_digit_on_a_large_page_is_looked_at_closely(tmp_path):
    """A tenth of the page wide, it would be 13 pixels wide where the paper is told from the ink."""
    page = Image.new("L", (1000, 1000), 255)
    page.paste(seven(100), (700, 40))
    images = []
    for picture in page, seven(100):
        picture.save(tmp_path / "seven.png")
        images.append(drawings.read_drawing(tmp_path / "seven.png").float() / 255)
    assert (images[0] - images[1]).abs().mean() < 0.01


def huge_png(width, height):
    """A PNG file of a few bytes that announces a picture of this size."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000)))


def test_images_are_found_in_directories_by_extension(tmp_path):
    for name in (
        "b.PNG",
        "a sêven.jpg",
        "0/deep/c.tiff",
        "IMG_1.HEIC",
        "notes.pdf",
        ".hidden.png",
        ".git/d.png",
    ):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    (tmp_path / "photos" / "folder.png").mkdir()
    (tmp_path / "alone.pdf").touch()
    images, others = drawings.find_images([tmp_path / "alone.pdf", tmp_path / "photos"])
    assert [path.name for path in images] == ["alone.pdf", "c.tiff", "a sêven.jpg", "b.PNG"]
    assert [path.name for path in others] == ["IMG_1.HEIC", "notes.pdf"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(drawings.DrawingError, match="empty contains no images"):
        drawings.find_images([tmp_path / "empty"])


def test_files_that_cannot_be_read_are_errors_that_name_them(tmp_path):
    seven().save(tmp_path / "seven.png")
    (tmp_path / "blank.png").write_bytes(b"")
    Image.new("L", (100, 100), 255).save(tmp_path / "empty.png")
    (tmp_path / "bomb.png").write_bytes(huge_png(60_000, 60_000))
    (tmp_path / "small bomb.png").write_bytes(
        huge_png(12_000, 12_000)
    )  # over the limit, under twice the limit
    (tmp_path / "cut.png").write_bytes((tmp_path / "seven.png").read_bytes()[:150])
    (tmp_path / "notes.txt").write_text("7")
    for name, reason in [
        ("blank.png", "is not an image that can be read"),
        ("bomb.png", "is too large: it has over "),
        ("small bomb.png", "is too large: it has over "),
        ("cut.png", "is not an image that can be read"),
        ("empty.png", "is empty: nothing stands out from the background"),
        ("missing.png", ": no such file"),
        ("", ": not a regular file"),
        ("notes.txt", "is not an image that can be read"),
    ]:
        with pytest.raises(drawings.DrawingError) as caught:
            drawings.read_drawing(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and reason in str(caught.value)
