import hashlib
import re
from pathlib import Path

import onnxruntime
import pytest
import torch

import datafile
import evaluate
import train
from conftest import RAW_DIR, ROOT, WEIGHTS
from support import checkpoint
from support.metrics import accuracy, predict
from test_models import PARAMETERS

METRICS = {"lr", "training_loss", "training_accuracy", "validation_loss", "validation_accuracy"}
README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE))


def flags_of(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}


def test_the_table_of_flags_has_every_flag_and_no_other(capsys):
    cells = re.findall(r"^\| (`--.*?) \|", SECTIONS["Train"].split("**Resume.**")[0], re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", " ".join(cells))) == flags_of(train, capsys)


def test_each_flag_of_evaluate_is_in_readme(capsys):
    assert all(flag in SECTIONS["Use"] for flag in flags_of(evaluate, capsys))


def test_the_defaults_in_the_table_and_in_the_help_are_those_of_the_recipes(capsys):
    recipes = train.RECIPES.values()
    epochs, rates = (", ".join(map(str, values)) for values in zip(*recipes))
    assert f"| `--epochs N` | {epochs} |" in README and f"| `--lr LR` | {rates} |" in README
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"default: {epochs}, by model" in text
    assert f"default: {rates}, by model; times 5 for sgd" in text


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_first_table_has_the_models_parameters_bytes_and_epochs(name):
    size = (WEIGHTS / f"{name}.pth").stat().st_size / 1000
    row = f"| `{name}` | {PARAMETERS[name]:,} | {size:.0f} kB | {train.RECIPES[name].epochs} |"
    assert row in README


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_trained_weights_have_the_test_accuracy_in_the_table(name, mnist):
    model = checkpoint.load(ROOT / "models" / "weights" / f"{name}.pth", name)
    test_accuracy = accuracy(*predict(model, mnist.test))
    assert re.search(
        rf"^\| `{name}.pth` \| \d+ \| .* \| {100 * test_accuracy:.2f}% \|$", README, re.MULTILINE
    )


def test_the_trained_weights_are_evaluated_without_arguments(call):
    output = call("evaluate.py", "--device", "cpu").stdout
    weights = Path("models") / "weights" / "Model_3.pth"
    (accuracy,) = re.findall(r"^\| `Model_3.pth` .* \| (\S+) \|$", README, re.MULTILINE)
    assert f"{weights}: Model_3, 4,506 parameters\nTest Accuracy: {accuracy}" in output
    assert f"Data: {RAW_DIR} (MNIST)\n" in output and "Ensemble" not in output


def test_the_lines_that_read_an_image_and_export_a_model_work(tmp_path, monkeypatch):
    load, export = re.findall(r"```python\n(.*?)```", SECTIONS["Use"], re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(load, names)
    assert names["digit"] == 7

    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path / "export")
    exec(export, names)
    assert [path.name for path in Path().iterdir()] == [
        "mnist.onnx"
    ]  # one file, loaded from another directory
    assert str(ROOT).encode() not in Path("mnist.onnx").read_bytes()
    session = onnxruntime.InferenceSession(Path("mnist.onnx").rename(tmp_path / "copy.onnx"))
    images = torch.rand(5, 1, 28, 28)
    for batch in images[:1], images:
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        expected = names["model"](batch).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


def test_the_images_of_the_page_are_read_and_the_history_is_where_it_says(call, fit, tmp_path, monkeypatch):
    (line,) = re.findall(r"^python evaluate.py --images (.*)$", README, re.MULTILINE)
    output = call(
        "evaluate.py", "--device", "cpu", "--images", *(ROOT / path for path in line.split())
    ).stdout
    assert re.findall(r": (\d) \(", output) == ["7", "9"]
    fit("--epochs", 2)
    (expression,) = re.findall(r"`(torch\.load\(.*?)`", SECTIONS["Train"])
    assert [set(epoch) for epoch in eval(expression)] == [METRICS] * 2


def test_checksums_are_those_of_the_files():
    page = (ROOT / "data" / "README.md").read_text()
    for name in datafile.FILES:
        digest = hashlib.sha256((RAW_DIR / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in page
