import hashlib
import re

import onnxruntime
import pytest
import torch

import datafile
import evaluate
import models
import train
from conftest import RAW_DIR, ROOT

README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE))


def flags_of(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}


def test_every_flag_is_in_the_table_and_no_other(capsys):
    cells = re.findall(r"^\| (`--.*?) \|", SECTIONS["Train"].split("**Resume.**")[0], re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", " ".join(cells))) == flags_of(train, capsys)


def test_each_flag_of_evaluate_is_shown(capsys):
    assert all(flag in SECTIONS["Use it"] for flag in flags_of(evaluate, capsys))


@pytest.mark.parametrize("name", train.RECIPES)
def test_the_results_table_has_the_models_parameters_and_epochs(name):
    parameters = sum(p.numel() for p in getattr(models, name)().parameters())
    assert f"| `{name}` | {parameters:,} | {train.RECIPES[name].epochs} |" in README


def test_the_lines_that_use_and_export_a_saved_model_work(tmp_path, monkeypatch, mnist):
    monkeypatch.chdir(tmp_path)
    torch.save(models.Model_3().state_dict(), "best_Model_3.pth")
    load, export = re.findall(r"```python\n(.*?)```", SECTIONS["Use it"], re.DOTALL)
    images = mnist[2].dataset.tensors[0][:1_000]
    names = {"images": images}
    exec(load, names)
    assert names["digits"].shape == (1_000,) and names["digits"].dtype == torch.int64

    exec(export, names)
    session = onnxruntime.InferenceSession("mnist.onnx")
    for batch in images[:1], images:
        (logits,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        expected = names["model"](batch).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


def test_checksums_are_those_of_the_files():
    page = (ROOT / "data" / "README.md").read_text()
    for name in datafile.FILES:
        digest = hashlib.sha256((RAW_DIR / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in page
