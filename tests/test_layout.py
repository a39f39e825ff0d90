"""The layout of the project: imports between modules, and how a model is added."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import models
import train
from conftest import ONE_THREAD, ROOT, seven

ALLOWED = {  # parts of the project that a module may import
    "models": {"models"},
    "support": {"models", "support"},
    "datafile": {"support"},
    "train": {"datafile", "models", "support"},
    "evaluate": {"datafile", "models", "support"},
}
README = (ROOT / "README.md").read_text()
MODULES = [
    *ROOT.glob("*.py"),
    *ROOT.glob("models/*.py"),
    *ROOT.glob("support/**/*.py"),
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_and_functions_fit_on_a_screen(path):
    place = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [place if node.level else node.module]
        found = {name.split(".")[0] for name in names} & ALLOWED.keys()
        assert found <= ALLOWED[place], f"line {node.lineno}"
        assert not isinstance(node, ast.Assert), "it is left out by python -O"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_packages_of_the_same_names_elsewhere_change_nothing(tmp_path):
    for name in "support", "models", "datafile":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    environment = ONE_THREAD | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    (snippet,) = re.findall(r"```python\n(import torch\nfrom datafile.*?)```", README, re.DOTALL)
    command = [sys.executable, "-c", snippet]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("path", [*ROOT.glob("tests/measure/*.py")], ids=lambda path: path.name)
def test_scripts_that_measure_have_a_usage_message(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {path.name}")


MODEL_4 = '''
import torch
from torch import nn


class Model_4(nn.Module):
    """A perceptron of 7,960 parameters: no Sequential, and without a convolution."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(784, 10), nn.Linear(10, 10)

    def forward(self, images):
        return self.out(torch.relu(self.hidden(images.flatten(1))))
'''


def test_a_model_is_added_by_a_file_an_import_and_a_recipe(small_data, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "data", "tests", "*.pth", "__pycache__")
    )
    (copy / "models" / "model_4.py").write_text(MODEL_4)
    with (copy / "models" / "__init__.py").open("a") as file:
        file.write('from .model_4 import Model_4\n\nMODELS["Model_4"] = Model_4\n')
    script = (copy / "train.py").read_text()
    after = "    Recipe,\n"
    assert script.count(after) == 1
    (copy / "train.py").write_text(script.replace(after, f"{after}    Model_4=Recipe(epochs=1, lr=0.004),\n"))

    def run(*arguments):
        command = [sys.executable, *map(str, arguments), "--data-dir", small_data, "--device", "cpu"]
        process = subprocess.run(command, cwd=copy, env=ONE_THREAD, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout

    output = run("train.py", "--model", "Model_4")
    assert "--lr 0.004 " in output and "Epoch: 1/1\n" in output and "Test Accuracy: " in output
    assert "best_Model_4.pth: Model_4, 7,960 parameters\n" in run("evaluate.py", "best_Model_4.pth")


class Recurrent(nn.Module):
    """A model that torchsummary cannot show, with a buffer that is not finite and a shared parameter."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(28, 10, batch_first=True)
        self.register_buffer("mask", torch.full((28, 28), -torch.inf).triu(1))
        self.out = nn.Linear(10, 10, bias=False)
        self.again = self.out

    def forward(self, images):
        rows, _ = self.lstm(images[:, 0])
        attention = (rows @ rows.mT + self.mask).softmax(2)
        return self.again(self.out((attention @ rows)[:, -1]))


def test_what_pytorch_trains_is_trained_and_its_parameters_are_counted_once(fit, call, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "Recurrent", Recurrent)
    monkeypatch.setitem(train.RECIPES, "Recurrent", train.Recipe(epochs=2))
    output = fit("--model", "Recurrent").stdout
    assert output.startswith(f"Parameters: {4 * 10 * (28 + 10 + 2) + 100:,}\n") and "Test Accuracy" in output
    state = torch.load(tmp_path / "best_Recurrent.pth", weights_only=True)
    assert torch.equal(state["mask"], Recurrent().mask)
    assert (
        "best_Recurrent.pth: Recurrent, 1,700 parameters" in call("evaluate.py", "best_Recurrent.pth").stdout
    )


def test_weights_whose_logits_are_not_finite_are_an_error(fit, call, monkeypatch, tmp_path):
    state = models.Model_3().state_dict()
    state["2.running_var"].fill_(-1)
    torch.save(state, tmp_path / "negative.pth")
    seven().save(tmp_path / "seven.png")
    for arguments, name in ([], "negative.pth: "), (["--images", "seven.png"], ""):
        ended = call("evaluate.py", "negative.pth", *arguments, check=False)
        assert ended.stderr.startswith(f"evaluate.py: error: {name}the model's logits are not finite")
        assert ended.returncode == 1 and "nan" not in ended.stdout
    finite = models.Model_1.forward
    monkeypatch.setattr(
        models.Model_1, "forward", lambda self, x: finite(self, x) / (1 if self.training else 0)
    )
    ended = fit("--model", "Model_1", "--epochs", 1, check=False)
    sentence = "the model's logits are not finite: if it is in training, try a lower --lr"
    assert (ended.returncode, ended.stderr) == (1, f"train.py: error: {sentence}\n")
