import sys

import pytest
from PIL import Image

from conftest import seven


def is_small_png(path):
    with Image.open(path) as image:
        return image.format == "PNG" and image.width >= 300 and path.stat().st_size < 200_000


def test_pictures_are_drawn_small(call, fit, trained, small_data, tmp_path):
    seven().save(tmp_path / "seven.png")
    model, options = trained / "best_Model_1.pth", ("--device", "cpu", "--plot", "plots")
    call("evaluate.py", model, trained / "best_Model_3.pth", "--data-dir", small_data, *options)
    call("evaluate.py", model, "--images", *["seven.png"] * 3, *options)
    output = fit("--model", "Model_1", "--epochs", 2, "--runs", 2, "--plot", "plots").stdout
    names = {"confusion", "mistakes", "filters", "seen"}
    names |= {"curves_Model_1_seed0", "curves_Model_1_seed1"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == names
    assert all(is_small_png(path) for path in (tmp_path / "plots").iterdir())
    assert "See plots/curves_Model_1_seed0.png\n" in output


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "requires matplotlib: pip install matplotlib"),
        ("raise ImportError('numpy.core failed to import\\nsecond line')", "numpy.core failed to import"),
        ("import numpy.no_such_module", "No module named 'numpy.no_such_module'"),
        ("raise AttributeError('_ARRAY_API not found')", "_ARRAY_API not found"),
    ],
)
def test_a_missing_or_broken_matplotlib_is_one_sentence(
    call, trained, tmp_path, monkeypatch, content, reason
):
    missing = "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    (tmp_path / "matplotlib.py").write_text(content or missing)
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    for arguments in ("train.py",), ("evaluate.py", trained / "best_Model_1.pth"):
        process = call(*arguments, "--plot", "plots", check=False)
        assert process.returncode == 1 and process.stdout == ""
        assert process.stderr.startswith(f"{arguments[0]}: error: --plot requires matplotlib")
        assert process.stderr.rstrip().endswith(reason) and process.stderr.count("\n") == 1
