import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image

from conftest import ONE_THREAD, WEIGHTS, seven
from support import plots


def is_small_png(path):
    with Image.open(path) as image:
        return image.format == "PNG" and image.width >= 300 and path.stat().st_size < 200_000


def test_curves_show_each_metric_in_its_unit_and_the_saved_epoch():
    names = "lr", "training_loss", "training_accuracy", "validation_loss", "validation_accuracy"
    rows = [
        (0.1, 0.5, 0.8, 0.4, 0.85),
        (0.1, 0.3, 0.9, 0.2, 0.95),
        (0.01, 0.2, 0.92, 0.25, 0.94),
        (0.001, 0.2, 0.92, 0.24, 0.945),
    ]
    fig = plots.curves([dict(zip(names, row)) for row in rows], 2)
    for ax, metric, unit in zip(fig.axes, ("loss", "accuracy"), (1, 100)):
        lines = {line.get_label(): line for line in ax.get_lines()}
        for kind in "training", "validation":
            values = [unit * row[names.index(f"{kind}_{metric}")] for row in rows]
            assert list(lines[kind].get_ydata()) == pytest.approx(values)
            assert list(lines[kind].get_xdata()) == [1, 2, 3, 4]
        saved = unit * rows[1][names.index(f"validation_{metric}")]
        assert (lines["saved"].get_xdata()[0], lines["saved"].get_ydata()[0]) == (2, pytest.approx(saved))
        vertical = [list(line.get_xdata()) for line in ax.get_lines() if line.get_linestyle() == ":"]
        assert vertical == [[2.5, 2.5], [3.5, 3.5]]
        assert ax.get_title() == {"loss": "Loss", "accuracy": "Accuracy (%)"}[metric]
        assert ax.get_xlabel() == "Epoch" and ax.get_xlim() == (0.5, 4.5)
    for ax in plots.curves([dict(zip(names, row)) for row in rows[:2]], 2).axes:
        assert all(tick == int(tick) for tick in ax.get_xticks())
    legend = [text.get_text() for text in fig.axes[1].get_legend().get_texts()]
    assert legend == ["training", "validation", "saved", "learning rate lowered"]  # each once


def test_the_confusion_matrix_has_predictions_to_the_right_and_labels_down():
    labels, predictions = torch.tensor([7, 7, 7, 2, 4]), torch.tensor([1, 1, 7, 2, 9])
    (ax,) = plots.confusion(predictions, labels).axes
    texts = {(text.get_position()): text.get_text() for text in ax.texts}
    assert texts == {(1, 7): "2", (7, 7): "1", (2, 2): "1", (9, 4): "1"}
    assert {(text.get_ha(), text.get_va()) for text in ax.texts} == {("center", "center")}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Prediction", "Label")
    assert ax.get_title() == "3 errors in 5 images"
    assert list(ax.get_xticks()) == list(ax.get_yticks()) == list(range(10))
    shades = ax.get_images()[0].get_array()
    assert shades[7, 1] == 2 and shades[4, 9] == 1 and shades.sum() == 3


def test_mistakes_are_titled_label_as_prediction_the_most_confident_first(tmp_path, monkeypatch):
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 28, 28), torch.tensor([3, 5, 8, 1])
    probabilities = torch.full((4, 10), 0.01)
    for image, (digit, value) in enumerate([(2, 0.7), (5, 0.9), (0, 0.8), (7, 0.6)]):
        probabilities[image, digit] = value
    figures = {}
    monkeypatch.setattr(
        plots,
        "save",
        lambda path, plot, *arguments: figures.update({path.name: plot(*arguments)}),
    )
    plots.save_evaluation(images, probabilities, labels, tmp_path)
    assert list(figures) == ["confusion.png", "mistakes.png"]
    shown = [ax for ax in figures["mistakes.png"].axes if ax.get_images()]
    assert [ax.get_title() for ax in shown] == ["8 as 0, 80%", "3 as 2, 70%", "1 as 7, 60%"]
    assert [float(ax.get_images()[0].get_array()[0, 0]) for ax in shown] == [2, 0, 3]
    assert {ax.get_images()[0].get_cmap().name for ax in shown} == {"gray_r"}  # black ink on white
    many = torch.zeros(30, dtype=torch.int64)
    plots.save_evaluation(images[:1].expand(30, 1, 28, 28), probabilities[:1].expand(30, 10), many, tmp_path)
    assert sum(bool(ax.get_images()) for ax in figures["mistakes.png"].axes) == 24
    assert tuple(figures["mistakes.png"].get_size_inches()) == pytest.approx((8.8, 4), abs=0.1)  # three rows


def test_a_grid_has_a_place_for_each_image():
    for number in 8, 9:
        axes = plots.grid(torch.zeros(number, 28, 28), [""] * number).axes
        assert sum(bool(ax.get_images()) for ax in axes) == number and len(axes) == 8 * (number - 7)


def test_one_evaluation_leaves_no_plot_of_another(tmp_path):
    for name in "mistakes.png", "notes.png":
        (tmp_path / name).write_text("old")
    for _ in range(2):  # no errors
        plots.save_evaluation(torch.zeros(10, 1, 28, 28), torch.eye(10), torch.arange(10), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "notes.png"}


@pytest.mark.parametrize("broken", [False, True])
def test_a_directory_without_room_is_noticed_before_and_a_plot_that_fails_does_not_end_the_run(
    fit, tmp_path, monkeypatch, broken
):
    def fail(*arguments, **options):
        raise OSError(30, "Read-only file system")

    if broken:
        monkeypatch.setattr(plots, "curves", fail)
        ended = fit("--model", "Model_1", "--epochs", 1, "--plot", "plots")
        path = Path("plots") / "curves_Model_1.png"
        assert ended.stderr == f"train.py: {path} cannot be drawn: [Errno 30] Read-only file system\n"
        assert "Test Accuracy" in ended.stdout
        return
    monkeypatch.setattr("support.files.tempfile.TemporaryFile", fail)
    for arguments in ([], ["--plot", "plots"]):
        ended = fit("--model", "Model_1", "--epochs", 1, *arguments, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == "train.py: error: no file can be written to . (Read-only file system)\n"


def test_the_users_own_matplotlib_settings_are_ignored(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    plots.save(tmp_path / "confusion.png", plots.confusion, torch.tensor([1]), torch.tensor([1]))
    assert (tmp_path / "confusion.png").exists() and matplotlib.rcParams["text.usetex"] is True


def test_pictures_are_drawn_small(call, fit, small_data, tmp_path):
    seven().save(tmp_path / "seven.png")
    model, options = WEIGHTS / "Model_1.pth", ("--device", "cpu", "--plot", "plots")
    call("evaluate.py", model, WEIGHTS / "Model_3.pth", "--data-dir", small_data, *options)
    call("evaluate.py", model, "--images", *["seven.png"] * 3, *options)
    output = fit("--model", "Model_1", "--epochs", 2, "--runs", 2, "--plot", "plots").stdout
    names = {"confusion", "mistakes", "seen"}
    names |= {"curves_Model_1_seed0", "curves_Model_1_seed1"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == names
    assert all(is_small_png(path) for path in (tmp_path / "plots").iterdir())
    assert f"See {Path('plots') / 'curves_Model_1_seed0.png'}\n" in output


def test_a_plot_that_cannot_be_written_is_named_and_the_old_one_kept(call, small_data, tmp_path, monkeypatch):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "confusion.png").write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    options = "--device", "cpu", "--data-dir", small_data, "--plot", "plots"
    process = call("evaluate.py", WEIGHTS / "Model_1.pth", *options, check=False)
    name = Path("plots") / "confusion.png"
    assert process.stderr == f"evaluate.py: error: {name} could not be written (No space left on device)\n"
    assert [path.read_text() for path in (tmp_path / "plots").iterdir()] == ["old"]


def test_a_broken_style_file_is_reported_before_the_training(run, small_data, tmp_path):
    (tmp_path / "stylelib").mkdir()
    (tmp_path / "stylelib" / "broken.mplstyle").write_bytes(b"# \xff\xfe")
    environment = ONE_THREAD | {"MPLCONFIGDIR": str(tmp_path)}
    options = "--data-dir", small_data, "--device", "cpu", "--plot", "plots"
    process = run("train.py", "--model", "Model_1", *options, env=environment, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    *_, sentence = process.stderr.splitlines()  # after a line of matplotlib's own
    assert sentence.startswith("train.py: error: --plot requires matplotlib") and "utf-8" in sentence


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "requires matplotlib (pip install matplotlib): No module named 'matplotlib'"),
        ("raise ImportError('numpy.core failed to import\\nsecond line')", "numpy.core failed to import"),
        ("import numpy.no_such_module", "No module named 'numpy.no_such_module'"),
        ("raise AttributeError('_ARRAY_API not found')", "_ARRAY_API not found"),
        ("raise SystemError", "SystemError"),
    ],
)
def test_a_missing_or_broken_matplotlib_is_a_one_line_error(call, tmp_path, monkeypatch, content, reason):
    missing = "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    (tmp_path / "matplotlib.py").write_text(content or missing)
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    for arguments in ("train.py",), ("evaluate.py", WEIGHTS / "Model_1.pth"):
        process = call(*arguments, "--plot", "plots", check=False)
        assert process.returncode == 1 and process.stdout == ""
        assert process.stderr.startswith(f"{arguments[0]}: error: --plot requires matplotlib")
        assert process.stderr.rstrip().endswith(reason) and process.stderr.count("\n") == 1
