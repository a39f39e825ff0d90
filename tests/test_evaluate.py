import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import datafile
import evaluate
import models
from conftest import WEIGHTS, same, seven
from support import checkpoint, devices, plots
from support.handwriting.reading import read_digit


def test_scores_equal_those_of_plain_pytorch(call, mnist, small_data):
    paths = [WEIGHTS / "Model_1.pth", WEIGHTS / "Model_3.pth"]
    output = call("evaluate.py", *paths, "--device", "cpu", "--data-dir", small_data).stdout
    assert f"{paths[0]}: Model_1, 26,698 parameters\n" in output
    assert f"{paths[1]}: Model_3, 4,506 parameters\n" in output

    images, labels = (tensor[:1_000] for tensor in mnist[2].dataset.tensors)
    outputs = []
    for path in paths:
        model = getattr(models, path.stem)()
        model.load_state_dict(torch.load(path, weights_only=True))
        with torch.no_grad():
            outputs.append(model.eval()(images).softmax(1))
    outputs.append(sum(outputs))
    rows = re.findall(r"Test Accuracy: (.*)% \((\d+) errors\)\nRecall: (.*)\n", output)
    assert len(rows) == 3 and "\nEnsemble of 2 models\n" in output
    for (accuracy, wrong, recalls), probabilities in zip(rows, outputs, strict=True):
        right = probabilities.argmax(1) == labels
        assert int(wrong) == pytest.approx((~right).sum().item(), abs=1)  # another batch size, another sum
        assert float(accuracy) == pytest.approx(100 - int(wrong) / 10)
        for digit, recall in re.findall(r"(\d): ([\d.]+)%", recalls):
            expected = 100 * right[labels == int(digit)].float().mean().item()
            assert float(recall) == pytest.approx(expected, abs=1.2)
    assert len(re.findall(r"Latency: [\d.]+ ms; throughput: [\d,]+ images/s\n", output)) == 2


def test_a_file_that_is_not_a_model_is_a_one_line_error(tmp_path, call, fit):
    fit("--model", "Model_1", "--epochs", 1)
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 40)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    poisoned = models.Model_3().state_dict()
    poisoned["1.weight"][0] = torch.nan
    torch.save(poisoned, tmp_path / "nan.pth")
    for name, words in [
        ("noise.pth", " is corrupt or not a checkpoint"),
        ("other.pth", " does not contain the weights of Model_1 or Model_2 or Model_3"),
        ("nan.pth", ": 1.weight has values that are not finite"),
        ("missing.pth", ": no such file"),
        ("last_Model_1.pth", " is a training state; the weights are in the file best_..."),
    ]:
        process = call("evaluate.py", name, check=False)
        assert (process.returncode, process.stderr) == (1, f"evaluate.py: error: {name}{words}\n")


def test_images_are_classified_one_by_one_by_the_ensemble(call, tmp_path):
    seven().save(tmp_path / "seven.png")
    seven(ink=255, paper=0).save(tmp_path / "other.png")
    checkpoints = WEIGHTS / "Model_3.pth", WEIGHTS / "Model_3.pth"
    paths = "seven.png", "missing.png", "other.png"
    process = call("evaluate.py", *checkpoints, "--device", "cpu", "--images", *paths, check=False)
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    answers = [re.fullmatch(r"(.*): 7 \([\d.]+%\), then [^7] \([\d.]+%\)", line)[1] for line in lines]
    assert answers == ["seven.png", "other.png"]
    assert process.stderr == "evaluate.py: error: missing.png: no such file\n"
    assert call("evaluate.py", *checkpoints, "--images", "other.png").returncode == 0


def test_skipped_files_are_named_and_checkpoints_after_images_are_a_usage_error(call, tmp_path):
    (tmp_path / "photos" / "7").mkdir(parents=True)
    seven().save(tmp_path / "photos" / "7" / "seven.png")
    (tmp_path / "photos" / "IMG_1.HEIC").touch()
    process = call("evaluate.py", WEIGHTS / "Model_3.pth", "--device", "cpu", "--images", "photos")
    assert process.stderr == "Skipped files (convert HEIC to JPEG): IMG_1.HEIC\n"
    assert process.stdout.startswith(f"{Path('photos') / '7' / 'seven.png'}: 7 (")
    no_data = "argument --data-dir: not allowed with --images or --draw, which need no data set"
    for arguments, sentence in [
        (["--images", "seven.png", "best.pth"], "best.pth is not an image: put checkpoints before --images"),
        (["--draw", "--images", "seven.png"], "argument --images: not allowed with argument --draw"),
        (["--draw", "--plot", "plots"], "argument --plot: not allowed with argument --draw"),
        (["--draw", "--data-dir", "data"], no_data),
        (["--images", "seven.png", "--data-dir", "data"], no_data),
    ]:
        process = call("evaluate.py", *arguments, check=False)
        assert process.returncode == 2 and process.stderr.endswith(f"\nevaluate.py: error: {sentence}\n")


def test_an_empty_directory_is_skipped_and_only_empty_ones_are_an_error(call, tmp_path):
    (tmp_path / "empty").mkdir()
    seven().save(tmp_path / "seven.png")
    options = WEIGHTS / "Model_3.pth", "--device", "cpu", "--images"
    assert call("evaluate.py", *options, "empty", "seven.png").stdout.startswith("seven.png: 7 (")
    process = call("evaluate.py", *options, "empty", check=False)
    assert (process.returncode, process.stderr) == (1, "evaluate.py: error: no images in empty\n")


def test_pillows_warnings_are_not_printed(call, tmp_path, monkeypatch, recwarn):
    seven(2_100).save(tmp_path / "seven.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000_000)
    warnings.simplefilter("always")
    with Image.open(tmp_path / "seven.jpg"):
        assert len(recwarn) == 1  # about its size
    call("evaluate.py", WEIGHTS / "Model_3.pth", "--images", "seven.jpg")
    assert len(recwarn) == 1


@pytest.mark.parametrize("suffix", ["tiff", "gif"])
def test_a_file_of_several_pages_gets_a_warning(call, tmp_path, suffix):
    seven().save(tmp_path / f"pages.{suffix}", save_all=True, append_images=[seven(ink=50), seven(ink=90)])
    output = call("evaluate.py", WEIGHTS / "Model_3.pth", "--images", f"pages.{suffix}").stdout
    assert output.startswith(f"pages.{suffix}: 7 (")
    assert output.endswith("; only the first of 3 pages was read\n")


def test_an_ensemble_prints_the_mean_of_its_softmax_outputs_and_the_warning(call, tmp_path):
    page = Image.new("L", (420, 200), 255)
    page.paste(seven(), (0, 0))
    page.paste(seven().rotate(180), (210, 0))
    page.save(tmp_path / "two.png")
    paths = [WEIGHTS / "Model_1.pth", WEIGHTS / "Model_3.pth"]
    output = call("evaluate.py", *paths, "--device", "cpu", "--images", "*.png").stdout  # a pattern
    images = datafile.normalize(read_digit(tmp_path / "two.png")[None])
    each = [checkpoint.load(path)(images).softmax(1)[0].detach() for path in paths]
    assert (each[0] - each[1]).abs().max() > 0.01
    first, best = (sum(each) / 2).max(0)
    assert output.startswith(f"two.png: {best} ({first:.1%}), then ")
    assert output.endswith("%); this looks like more than one digit\n")


def test_the_plots_are_of_the_ensemble(call, small_data, monkeypatch):
    """Of its probabilities: the matrix has as many errors as are printed."""
    given = []
    monkeypatch.setattr(plots, "save_evaluation", lambda *arguments: given.extend(arguments))
    paths = [WEIGHTS / "Model_1.pth", WEIGHTS / "Model_3.pth"]
    options = "--device", "cpu", "--data-dir", small_data, "--plot", "plots"
    output = call("evaluate.py", *paths, *options).stdout
    errors = re.findall(r"\((\d+) errors\)", output)
    images, probabilities, labels, folder = given
    assert int(errors[2]) == (probabilities.argmax(1) != labels).sum() != int(errors[0])
    assert len(images) == 1_000 and folder == Path("plots")


@pytest.mark.parametrize("arguments, function", [([], "evaluate"), (["--draw"], "serve_page")])
def test_the_models_are_moved_to_the_device_that_is_selected(call, monkeypatch, arguments, function):
    used = []
    monkeypatch.setattr(devices, "select_device", lambda chosen: chosen or torch.device("meta"))
    monkeypatch.setattr(evaluate, function, lambda models, args: used.extend([args.device, *models]))
    call("evaluate.py", *arguments)
    device, model = used
    assert device == next(model.parameters()).device == torch.device("meta")


def test_only_64_images_are_plotted_and_the_others_are_counted(call, tmp_path, monkeypatch):
    plotted = []
    monkeypatch.setattr(plots, "save", lambda path, plot, digits, titles: plotted.extend(digits))
    seven().save(tmp_path / "seven.png")
    options = "--device", "cpu", "--plot", "plots", "--images", *["seven.png"] * 66
    output = call("evaluate.py", WEIGHTS / "Model_1.pth", *options).stdout
    assert output.endswith("\nseen.png shows the first 64 of 66 images\n") and len(plotted) == 64


def test_the_model_flag_chooses_the_class_and_patterns_name_checkpoints(call, tmp_path):
    shutil.copy(WEIGHTS / "Model_1.pth", tmp_path / "best_a.pth")
    options = "--device", "cpu"
    process = call("evaluate.py", "best_?.pth", "--model", "Model_2", *options, check=False)
    assert process.stderr == "evaluate.py: error: best_a.pth does not contain the weights of Model_2\n"
    seven().save(tmp_path / "seven.png")
    options = "--model", "Model_1", *options, "--images", "seven.png"
    assert call("evaluate.py", "best_?.pth", *options).stdout.startswith("seven.png: 7 (")


def test_the_plot_shows_each_image_as_the_model_saw_it(call, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(plots, "save", lambda path, plot, *given: grids.append((path.name, plot, *given)))
    for index, angle in enumerate([0, 90, 180]):
        seven().rotate(angle, fillcolor=255).save(tmp_path / f"{index}.png")
    names = [f"{index}.png" for index in range(3)]
    output = call("evaluate.py", "--device", "cpu", "--images", *names, "--plot", "plots").stdout
    ((name, plot, images, titles),) = grids
    assert (name, plot) == ("seen.png", plots.grid)
    assert same(list(images), [read_digit(tmp_path / name) for name in names])
    answers = re.findall(r"png: (\d) \((\d+\.\d)%\)", output)
    for title, (digit, confidence) in zip(titles, answers, strict=True):
        found = re.fullmatch(r"(\d) \((\d+)%\)", title)
        assert found[1] == digit and int(found[2]) == pytest.approx(float(confidence), abs=0.6)
