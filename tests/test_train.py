import contextlib
import copy
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import datafile
import models
import train
from conftest import ROOT

SMALL = "tests/train_small.py"
BLOCK = re.compile(
    r"^Epoch: (\d+)/(\d+)\n"
    r"Training Loss: (\d+\.\d{3})\n"
    r"Training Accuracy: (\d+\.\d{2})%\n"
    r"Validation Accuracy: (\d+\.\d{2})%\n"
    r"-{50}\n",
    re.MULTILINE,
)
TEST_LINE = re.compile(
    r"^Test Accuracy: (\d+\.\d{2})% \(epoch (\d+), (best_Model_[123]\w*\.pth)\)\nTime: \d+ s\n", re.M
)


@pytest.mark.parametrize("name", train.RECIPES)
def test_a_small_run_prints_learns_and_saves_a_plain_state_dict(name, run, small_data, tmp_path):
    output = run(SMALL, "--model", name, "--epochs", 3, "--data-dir", small_data, "--device", "cpu").stdout
    before, *_ = output.split("Epoch: 1/3")
    assert f"{name} on cpu, seed 0" in before and "Trainable params" in before
    assert "Images: 1,000 for training, 5,000 for validation, 1,000 for the test" in before
    blocks = BLOCK.findall(output)
    assert [(epoch, epochs) for epoch, epochs, *_ in blocks] == [("1", "3"), ("2", "3"), ("3", "3")]
    assert float(blocks[2][2]) < float(blocks[0][2])  # the loss fell
    (accuracy, epoch, file) = TEST_LINE.search(output).groups()
    validation = [float(block[4]) for block in blocks]
    assert int(epoch) == validation.index(max(validation)) + 1
    assert output.endswith(TEST_LINE.search(output)[0])

    # What was printed is what plain PyTorch gets out of the file.
    model = getattr(models, name)()
    model.load_state_dict(torch.load(tmp_path / file, weights_only=True))
    images, labels = (tensor[:1_000] for tensor in datafile.get_loaders()[2].dataset.tensors)
    correct = model.eval()(images).argmax(1) == labels
    assert float(accuracy) == pytest.approx(100 * correct.float().mean().item(), abs=0.005)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file, file.replace("best", "last")]


def test_model_1_reaches_98_percent_in_its_two_epochs(run):
    output = run("train.py", "--model", "Model_1").stdout
    assert "Images: 55,000 for training, 5,000 for validation, 10,000 for the test" in output
    assert len(BLOCK.findall(output)) == 2
    assert float(TEST_LINE.search(output)[1]) >= 98.0


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(run, small_data, tmp_path, threads):
    environment = os.environ | {"OMP_NUM_THREADS": threads}

    def weights(seed, folder):
        options = "--epochs", 2, "--data-dir", small_data, "--device", "cpu"
        run(SMALL, *options, "--seed", seed, "--output-dir", tmp_path / folder, env=environment)
        return torch.load(tmp_path / folder / "best_Model_3.pth", weights_only=True)

    first, again, other = weights(5, "first"), weights(5, "again"), weights(6, "other")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_all_trains_each_model_as_if_it_were_alone(run, small_data, tmp_path):
    options = "--epochs", 1, "--data-dir", small_data, "--device", "cpu"
    output = run(SMALL, *options, "--model", "all", "--output-dir", tmp_path / "all").stdout
    assert [found[2] for found in TEST_LINE.findall(output)] == [f"best_{name}.pth" for name in train.RECIPES]
    run(SMALL, *options, "--model", "Model_3", "--output-dir", tmp_path / "one")
    together, alone = (
        torch.load(tmp_path / folder / "best_Model_3.pth", weights_only=True) for folder in ("all", "one")
    )
    assert all(torch.equal(together[key], alone[key]) for key in alone)


def test_early_stopping_and_a_lowered_rate_are_announced(run, small_data):
    """At a rate of 2e-8 the validation accuracy stands still from the first epoch on."""
    options = "--model", "Model_1", "--lr", "2e-8", "--data-dir", small_data, "--device", "cpu"
    output = run(SMALL, *options, "--epochs", 6).stdout
    assert len(BLOCK.findall(output)) == 6
    blocks_before = BLOCK.findall(output.split("Learning rate lowered to 2e-09\n")[0])
    assert len(blocks_before) == 5  # the first is the best, four are not better: one more than patience
    output = run(SMALL, *options, "--epochs", 6, "--early-stopping", 2).stdout
    assert len(BLOCK.findall(output)) == 3 and "\nStopped early: " in output
    assert TEST_LINE.search(output)[2] == "1"


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(run, small_data, tmp_path):
    options = ["--epochs", "1", "--data-dir", str(small_data), "--device", "cpu"]
    assert run(SMALL, *options).stderr == ""

    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    command = [sys.executable, ROOT / SMALL, *options]
    every_step = os.environ | {"TQDM_MININTERVAL": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": its_end}
    with subprocess.Popen(command, cwd=tmp_path, env=every_step, **pipes) as process:
        os.close(its_end)
        drawn = b""
        with contextlib.suppress(OSError):  # the way Linux reports that the last writer has left
            while chunk := os.read(terminal, 4096):
                drawn += chunk
        output = process.stdout.read().decode()
    os.close(terminal)
    assert b"Epoch 1" in drawn and b"8/8" in drawn and b"loss" in drawn
    assert len(BLOCK.findall(output)) == 1


def test_an_epoch_never_waits_for_the_device():
    """Reading a value back would stop the host until the device has caught up."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "_local_scalar_dense" in str(function)
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = models.Model_3()
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    loader = [(images, labels)] * 30
    counts = []
    for length in 10, 30:
        with Reads() as reads:
            train.train_epoch(model, average, loader[:length], optimizer, 1)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 2  # the epoch's loss and accuracy, at its end


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_no_step_waits_for_the_device():
    class Watched(list):
        """A loader during whose epoch each wait for the device is an error; at the epoch's end it is none."""

        def __iter__(self):
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield from super().__iter__()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    model = models.Model_3().cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = torch.randn(64, 1, 28, 28).cuda(), (torch.arange(64) % 10).cuda()
    train.train_epoch(model, copy.deepcopy(model), Watched([(images, labels)] * 5), optimizer, 1)


MISTAKES = [
    (["--epochs", "0"], 2, "--epochs"),
    (["--epochs", "two"], 2, "--epochs"),
    (["--batch-size", "0"], 2, "--batch-size"),
    (["--lr", "nan"], 2, "--lr"),
    (["--lr", "inf"], 2, "--lr"),
    (["--lr", "0"], 2, "--lr"),
    (["--seed", "-1"], 2, "--seed"),
    (["--early-stopping", "0"], 2, "--early-stopping"),
    (["--model", "Model_4"], 2, "Model_4"),
    (["--device", "abacus"], 2, "abacus"),
    (["--device", "cuda:99"], 2, "cuda:99"),
    (["--device", "meta"], 2, "meta"),
    (["--output-dir", "a_file"], 1, "a_file"),
    (["--output-dir", "/proc"], 1, "/proc"),
    (["--output-dir", "has_a_folder"], 1, "best_Model_3.pth"),
    (["--data-dir", "broken"], 1, "train-images-idx3-ubyte"),
    (["--frobnicate"], 2, "--frobnicate"),
]


@pytest.mark.parametrize("arguments, status, named", MISTAKES, ids=lambda value: str(value))
def test_a_mistake_is_one_sentence_and_leaves_everything_alone(
    arguments, status, named, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "best_Model_3.pth").write_text("mine too")
    (tmp_path / "has_a_folder" / "best_Model_3.pth").mkdir(parents=True)
    raw_dir = tmp_path / "broken" / "MNIST" / "raw"
    raw_dir.mkdir(parents=True)
    for name in datafile.SHAPES:
        (raw_dir / name).write_bytes(b"not MNIST")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        train.main()
    printed = capsys.readouterr()
    if status == 1:  # Python prints the message and exits with status 1
        sentence = caught.value.code
    else:
        assert caught.value.code == status and printed.err.startswith("usage: ")
        sentence = printed.err.splitlines()[-1]
    assert sentence.startswith("train.py: error: ") and named in sentence and "\n" not in sentence
    assert printed.out == ""
    assert (tmp_path / "a_file").read_text() == "mine"
    assert (tmp_path / "best_Model_3.pth").read_text() == "mine too"


def test_a_failure_is_one_line_on_standard_error_and_status_1(run, tmp_path):
    process = run("train.py", "--output-dir", "/proc", check=False)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("train.py: error: ") and process.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_best_model(run, small_data, tmp_path):
    (tmp_path / "best_Model_1.pth").write_text("mine")
    process = run(SMALL, "--model", "Model_1", "--lr", "1e30", "--data-dir", small_data, check=False)
    assert process.returncode == 1
    assert re.fullmatch(
        r"train.py: error: the loss became (nan|inf) in epoch 1, step 2, at a learning rate of 1e\+30: .*\n",
        process.stderr,
    )
    assert (tmp_path / "best_Model_1.pth").read_text() == "mine"
