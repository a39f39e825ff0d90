import hashlib
import re

import pytest
import torch

import datafile
import evaluate
import models
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_flag_is_in_the_table_and_no_other(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    cells = re.findall(r"^\| (`--.*?) \|", README, re.MULTILINE)
    assert set(re.findall(r"--[a-z-]+", " ".join(cells))) == flags


def test_each_flag_of_evaluate_is_shown(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    section = README.split("\n## Using a saved model\n")[1].split("\n## ")[0]
    assert all(flag in section for flag in flags)


@pytest.mark.parametrize("name", train.RECIPES)
def test_the_results_table_has_the_models_parameters_and_epochs(name):
    parameters = sum(p.numel() for p in getattr(models, name)().parameters())
    assert f"| `{name}` | {parameters:,} | {train.RECIPES[name].epochs} |" in README


def test_the_lines_that_use_a_saved_model_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(models.Model_3().state_dict(), "best_Model_3.pth")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"images": datafile.get_loaders()[2].dataset.tensors[0][:100]}
    exec(code, names)
    assert names["digits"].shape == (100,) and names["digits"].dtype == torch.int64


def test_checksums_are_those_of_the_files():
    page = (ROOT / "data" / "README.md").read_text()
    for name in datafile.SHAPES:
        digest = hashlib.sha256((datafile.DATA_DIR / "MNIST" / "raw" / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in page
