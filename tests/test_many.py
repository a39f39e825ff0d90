"""Optimisers, and many runs or folds of a model, in one process and under torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import datafile
import train
from conftest import ROOT
from models import checkpoint
from test_checkpoint import same
from test_datafile import fingerprints
from test_train import TEST_LINE

SMALL = "tests/train_small.py"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone"


def table(output):
    """The rows of the table at the end, each a name and what follows it."""
    (text,) = re.findall(r"\nModel_[123] +Validation +Test\n(.*)\Z", output, re.DOTALL)
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


def files(folder):
    return {path.name: checkpoint.read(path) for path in folder.glob("best_*.pth")}


@pytest.fixture
def train_small(small_data, tmp_path, monkeypatch):
    """Trains Model_1 on the small data in this process; returns what its training state then is."""
    for name, shape in datafile.SHAPES.items():
        monkeypatch.setitem(datafile.SHAPES, name, (6_000 if name.startswith("train") else 1_000, *shape[1:]))

    def train_small(folder, *arguments):
        (tmp_path / folder).mkdir(exist_ok=True)
        options = "--data-dir", small_data, "--device", "cpu", "--output-dir", tmp_path / folder
        train.train("Model_1", train.parse_args([str(argument) for argument in options + arguments]), 0)
        return checkpoint.read(tmp_path / folder / "last_Model_1.pth")

    return train_small


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_each_optimiser_learns_and_resumes_to_the_same_bits(optimizer, train_small):
    whole = train_small("whole", "--optimizer", optimizer, "--epochs", 3)
    losses = [row[1] for row in whole["history"]]
    assert losses[2] < losses[0]
    train_small("parts", "--optimizer", optimizer, "--epochs", 1)
    assert same(train_small("parts", "--optimizer", optimizer, "--epochs", 3, "--resume"), whole)
    other = "sgd" if optimizer == "adam" else "adam"
    with pytest.raises(ValueError, match=f"is of a run with --optimizer {optimizer}, not {other}"):
        train_small("parts", "--optimizer", other, "--epochs", 3, "--resume")


def test_no_augment_trains_on_the_images_as_they_are(train_small):
    plain, augmented, default = (
        train_small(str(index), "--epochs", 1, *flags)["model"]
        for index, flags in enumerate([["--no-augment"], ["--augment"], []])
    )
    assert same(augmented, default) and not same(augmented, plain)


@pytest.mark.parametrize("folds", [2, 7])
def test_folds_validate_each_training_image_once_and_hold_each_digit_evenly(folds):
    raw_dir = datafile.DATA_DIR / "MNIST" / "raw"
    images, labels = datafile.read_split(raw_dir, "train")
    validated, counts = [], []
    for fold in range(1, folds + 1):
        train_loader, validation_loader, _ = datafile.get_loaders(seed=3, fold=(fold, folds))
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


def test_runs_and_folds_end_with_a_table_and_the_ensemble(run, small_data, tmp_path):
    options = "--model", "Model_1", "--epochs", 2, "--data-dir", small_data, "--device", "cpu"
    output = run(SMALL, *options, "--runs", 3, "--seed", 4).stdout
    rows = table(output)
    assert list(rows) == ["seed 4", "seed 5", "seed 6", "mean ± sd", "lowest", "ensemble"]
    tests = [float(line[0]) for line in TEST_LINE.findall(output)]
    assert [float(rows[f"seed {seed}"].split()[1][:-1]) for seed in (4, 5, 6)] == tests
    mean, _, spread = rows["mean ± sd"].split()[3:]
    assert float(mean[:-1]) == pytest.approx(sum(tests) / 3, abs=0.01)
    assert float(spread[:-1]) == pytest.approx(torch.tensor(tests).std().item(), abs=0.01)
    assert float(rows["lowest"].split()[1][:-1]) == min(tests)

    # The ensemble's accuracy is what the saved files give.
    images, labels = (tensor[:1_000] for tensor in datafile.get_loaders()[2].dataset.tensors)
    models = [checkpoint.load(tmp_path / f"best_Model_1_seed{seed}.pth") for seed in (4, 5, 6)]
    with torch.no_grad():
        together = sum(model(images).softmax(1) for model in models)
    accuracy = (together.argmax(1) == labels).float().mean().item()
    assert float(rows["ensemble"][:-1]) == pytest.approx(100 * accuracy, abs=0.005)

    alone = run(SMALL, *options, "--seed", 5, "--output-dir", "alone")
    assert alone.returncode == 0
    assert same(files(tmp_path / "alone")["best_Model_1.pth"], files(tmp_path)["best_Model_1_seed5.pth"])

    rows = table(run(SMALL, *options, "--folds", 2, "--output-dir", "folds").stdout)
    assert list(rows) == ["fold 1", "fold 2", "mean ± sd", "lowest", "ensemble"]
    assert set(files(tmp_path / "folds")) == {"best_Model_1_fold1.pth", "best_Model_1_fold2.pth"}
    process = run(SMALL, *options, "--folds", 3, "--output-dir", "folds", "--resume", check=False)
    assert "is of a run with --folds 1 of 2, not 1 of 3" in process.stderr


def workers(number, folder, *arguments, **options):
    command = [*TORCHRUN, f"--nproc-per-node={number}", ROOT / SMALL, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ONE_THREAD, **pipes, **options)


def test_workers_share_the_runs_and_give_the_bits_of_one(small_data, tmp_path):
    options = "--model", "Model_1", "--epochs", 2, "--data-dir", small_data, "--device", "cpu", "--runs", 4
    outputs = []
    for number in 1, 2, 3:
        process = workers(number, tmp_path, *options, "--output-dir", number)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        outputs.append(table(output))
    assert outputs[0] == outputs[1] == outputs[2]
    assert same(files(tmp_path / "1"), files(tmp_path / "2"))
    assert same(files(tmp_path / "1"), files(tmp_path / "3"))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_costs_only_its_unfinished_run(small_data, tmp_path):
    options = "--model", "Model_1", "--epochs", 6, "--data-dir", small_data, "--device", "cpu", "--runs", 3
    process = workers(2, tmp_path, *options, "--output-dir", "killed")
    while not (tmp_path / "killed" / "best_Model_1_seed1.pth").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    process = workers(2, tmp_path, *options, "--output-dir", "killed", "--resume")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    process = workers(1, tmp_path, *options, "--output-dir", "whole")
    expected, _ = process.communicate()
    assert table(output) == table(expected)
    assert same(files(tmp_path / "killed"), files(tmp_path / "whole"))


def test_workers_do_not_share_a_single_run(small_data, tmp_path):
    process = workers(2, tmp_path, "--data-dir", small_data)
    output, errors = process.communicate()
    assert process.returncode != 0 and output == ""
    assert "train.py: error: several workers need --runs or --folds: they do not share one run\n" in errors
    assert list(tmp_path.iterdir()) == []
