import contextlib
import copy
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import datafile
import models
import train
from conftest import BLOCK, ONE_THREAD, RAW_DIR, ROOT, TEST_LINE, best_weights, same, saved_states, write_idx
from support import checkpoint, devices
from support.augmentation import augment
from test_models import PARAMETERS


@pytest.mark.parametrize("name", train.RECIPES)
def test_a_small_run_prints_learns_and_saves_a_plain_state_dict(name, fit, small_data, tmp_path):
    output = fit("--model", name, "--epochs", 3).stdout
    before, *_ = output.split("Epoch: 1/3")
    lr = train.RECIPES[name].lr
    settings = f"--batch-size 128 --optimizer adam --lr {lr} --augment --seed 0"
    versions = f"PyTorch {torch.__version__}, CPU threads: 1"
    assert (
        before.startswith("-----")
        and "Conv2d-" in before
        and f"\nParameters: {PARAMETERS[name]:,}\n\n{name} on cpu: {settings}\n{versions}\n" in before
    )
    assert f"\nData: {small_data / 'MNIST' / 'raw'} (not MNIST)\n" in before
    assert "\nImages: 1,100 for training, 100 for validation, 1,000 for testing\n" in before
    blocks = BLOCK.findall(output)
    assert [(epoch, epochs) for epoch, epochs, *_ in blocks] == [("1", "3"), ("2", "3"), ("3", "3")]
    assert float(blocks[2][2]) < float(blocks[0][2])  # the loss fell
    (accuracy, epoch, file) = TEST_LINE.search(output).groups()
    validation = [float(block[4]) for block in blocks]
    assert int(epoch) == validation.index(max(validation)) + 1
    assert output.endswith(TEST_LINE.search(output)[0])

    # Plain PyTorch gets the printed accuracy from the file.
    model = getattr(models, name)()
    model.load_state_dict(torch.load(tmp_path / file, weights_only=True))
    images, labels = (tensor[:1_000] for tensor in datafile.get_loaders()[2].dataset.tensors)
    correct = model.eval()(images).argmax(1) == labels
    assert float(accuracy) == pytest.approx(100 * correct.float().mean().item(), abs=0.005)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file, file.replace("best", "last")]


def test_model_3_reaches_98_5_percent_in_one_epoch(call):
    """With seeds 0 to 2, it has 99.0% or more; a recipe or a model that lost a point would not."""
    output = call("train.py", "--epochs", 1, "--device", "cpu").stdout
    assert float(TEST_LINE.search(output)[1]) >= 98.5


def test_model_1_reaches_98_percent_in_its_two_epochs(call):
    output = call("train.py", "--model", "Model_1").stdout
    assert f"\nData: {RAW_DIR} (MNIST)\n" in output
    assert "\nImages: 55,000 for training, 5,000 for validation, 10,000 for testing\n" in output
    assert len(BLOCK.findall(output)) == 2
    assert float(TEST_LINE.search(output)[1]) >= 98.0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(fit, tmp_path, threads):
    def weights(seed, folder):
        fit("--epochs", 2, "--seed", seed, "--output-dir", folder)
        return torch.load(tmp_path / folder / "best_Model_3.pth", weights_only=True)

    torch.set_num_threads(threads)
    try:
        first, again, other = weights(5, "first"), weights(5, "again"), weights(6, "other")
    finally:
        torch.set_num_threads(1)
    assert same(first, again) and not same(first, other)


def test_all_trains_each_model_as_a_run_of_its_own(fit, tmp_path):
    output = fit("--epochs", 1, "--model", "all", "--output-dir", "all").stdout
    assert [found[2] for found in TEST_LINE.findall(output)] == [f"best_{name}.pth" for name in train.RECIPES]
    fit("--epochs", 1, "--output-dir", "one")
    together, alone = (saved_states(tmp_path / folder)["best_Model_3.pth"] for folder in ("all", "one"))
    assert same(together, alone)


def test_early_stopping_and_a_lowered_rate_are_announced(fit):
    """At a learning rate of 2e-8 the validation accuracy is constant from the first epoch on."""
    options = "--model", "Model_1", "--lr", "2e-8"
    output = fit(*options, "--epochs", 6).stdout
    assert len(BLOCK.findall(output)) == 6
    blocks_before = BLOCK.findall(output.split("Learning rate lowered to 2e-09\n")[0])
    assert len(blocks_before) == 5  # four are no better than the first: one more than patience
    output = fit(*options, "--epochs", 6, "--early-stopping", 2).stdout
    assert len(BLOCK.findall(output)) == 3 and "\nEarly stopping: " in output
    assert TEST_LINE.search(output)[2] == "3"  # on ties the last one, which has been trained for longer

    # An interruption does not reset the count.
    options = *options, "--early-stopping", 3, "--resume", "--output-dir", "resumed"
    assert "Early stopping" not in fit(*options, "--epochs", 2).stdout
    output = fit(*options, "--epochs", 9).stdout
    assert [block[0] for block in BLOCK.findall(output)] == ["3", "4"]
    assert "\nEarly stopping: no improvement for 3 epochs\n" in output
    output = fit(*options, "--epochs", 9).stdout
    assert BLOCK.findall(output) == []
    assert f"\nResuming from {Path('resumed') / 'last_Model_1.pth'} (epoch 4)\n" in output


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_each_optimizer_learns_and_resumes_to_the_same_bits(optimizer, fit, tmp_path):
    def state(folder, *arguments, **options):
        process = fit("--model", "Model_1", "--output-dir", folder, "--optimizer", *arguments, **options)
        return process.stderr or saved_states(tmp_path / folder)["last_Model_1.pth"]

    whole = state("whole", optimizer, "--epochs", 3)
    losses = [epoch["training_loss"] for epoch in whole["state"]["history"]]
    assert losses[2] < losses[0]
    state("parts", optimizer, "--epochs", 1)
    assert same(state("parts", optimizer, "--epochs", 3, "--resume"), whole)
    other = "sgd" if optimizer == "adam" else "adam"
    errors = state("parts", other, "--epochs", 3, "--resume", check=False)
    assert f"was saved with --optimizer {optimizer}, not --optimizer {other}: " in errors
    assert same(saved_states(tmp_path / "parts")["last_Model_1.pth"], whole)


def test_no_augment_trains_on_the_images_as_they_are(fit, tmp_path, monkeypatch):
    states, calls = [], []
    monkeypatch.setattr(train, "augment", lambda *images: calls.append(1) or augment(*images))
    for index, flags in enumerate([["--no-augment"], ["--augment"], []]):
        output = fit("--model", "Model_1", "--epochs", 1, *flags, "--output-dir", index).stdout
        assert ("--no-augment" in output) == (index == 0) == (not calls)
        states.append(saved_states(tmp_path / str(index))["best_Model_1.pth"])
    plain, augmented, default = states
    assert same(augmented, default) and not same(augmented, plain)


def test_a_bar_is_drawn_on_a_terminal_only(small_data, tmp_path):
    pty, termios = (pytest.importorskip(name, reason="Windows has none") for name in ("pty", "termios"))
    options = ["--model", "Model_1", "--epochs", "1", "--data-dir", str(small_data), "--device", "cpu"]
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    command = [sys.executable, ROOT / "train.py", *options, "--batch-size", "10"]
    every_step = ONE_THREAD | {"TQDM_MININTERVAL": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": its_end}
    with subprocess.Popen(command, cwd=tmp_path, env=every_step, **pipes) as process:
        os.close(its_end)
        drawn = b""
        with contextlib.suppress(OSError):  # the way Linux reports that the last writer has left
            while chunk := os.read(terminal, 4096):
                drawn += chunk
        output = process.stdout.read().decode()
    os.close(terminal)
    assert b"\rEpoch 1" in drawn and b"110/110" in drawn and re.search(rb"loss \d\.\d{3}, \d+\.\d\d%", drawn)
    assert len(BLOCK.findall(output)) == 1
    assert drawn.endswith(b"\r")  # the bar is wiped, and no line of its own is left


class Reads(TorchDispatchMode):
    """Counts how often a value is read back from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def epoch():
    """Trains Model_3 for an epoch on these batches of noise; returns the result of `train_epoch`."""
    torch.manual_seed(0)
    model = models.Model_3()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10

    def epoch(batches):
        loader = [(images, labels)] * batches
        return train.train_epoch(model, copy.deepcopy(model), loader, optimizer, 1)

    return epoch


def test_an_epoch_never_waits_for_the_device(epoch):
    """Reading a value back would stop the host until the device has caught up."""
    counts = []
    for batches in 10, 60:
        with Reads() as reads:
            epoch(batches)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 2  # the epoch's loss and accuracy, at its end


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
def test_on_cuda_no_step_waits_for_the_device():
    class Watched(list):
        """A loader: within its epoch, each synchronization with the device is an error."""

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


@needs_cuda
def test_on_cuda_a_graph_trains_as_the_kernels_one_by_one_do(mnist, monkeypatch):
    images, labels = (tensor[:1_000].cuda() for tensor in mnist.validation.dataset.tensors)
    loader = list(zip(images.split(128), labels.split(128)))  # the last batch is smaller
    results, watched = [], mock.Mock(wraps=devices.capture)
    for capture in watched, lambda function, *batch: function:
        monkeypatch.setattr(devices, "capture", capture)
        torch.manual_seed(0)
        model = models.Model_1().cuda()
        average, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), lr=0.003, fused=True)
        epochs = (train.train_epoch(model, average, loader, optimizer, i, False) for i in range(1, 5))
        results.append([loss for loss, _ in epochs])
    assert watched.call_count == 4
    torch.testing.assert_close(*results, rtol=0.03, atol=0)  # a graph that reads one batch only: 7 to 20% off


@pytest.mark.parametrize("epoch", [1, 3])
def test_metrics_and_average_of_an_epoch_are_those_of_a_plain_loop(mnist, epoch):
    """The last batch is smaller; the average is computed in closed form."""
    images, labels = (tensor[:300] for tensor in mnist.validation.dataset.tensors)
    loader = list(zip(images.split(128), labels.split(128)))
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 5, 2), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(576, 10)
    )
    plain, average = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, other = (torch.optim.Adam(net.parameters(), lr=0.01, fused=True) for net in (model, plain))
    loss, accuracy = train.train_epoch(model, average, loader, optimizer, epoch, augmented=False)

    losses, correct = 0.0, 0
    numbers = [key for key, value in plain.state_dict().items() if value.is_floating_point()]
    assert "1.running_mean" in numbers and "1.running_var" in numbers
    expected = {key: plain.state_dict()[key].clone() for key in numbers}
    for step, (x, y) in enumerate(loader, 1):
        logits = plain(x)
        each = cross_entropy(logits, y, reduction="none")
        losses, correct = losses + float(each.detach().sum()), correct + int((logits.argmax(1) == y).sum())
        other.zero_grad()
        each.mean().backward()
        other.step()
        weight = 9 / (9 + (epoch - 1) * len(loader) + step)
        expected = {k: (1 - weight) * v + weight * plain.state_dict()[k] for k, v in expected.items()}
    assert loss == pytest.approx(losses / 300, rel=1e-5) and accuracy == pytest.approx(correct / 300)
    averaged = {key: average.state_dict()[key] for key in numbers}
    torch.testing.assert_close(averaged, expected, rtol=1e-4, atol=1e-5)


def table(output):
    """The rows of the table at the end, each a name and its columns."""
    (text,) = re.findall(r"\nModel_\w+ +Validation +Test\n(.*)\Z", output, re.DOTALL)
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


def test_runs_and_folds_end_with_a_table_and_the_ensemble(fit, tmp_path):
    options = "--model", "Model_1", "--epochs", 2
    output = fit(*options, "--runs", 3, "--seed", 4).stdout
    rows = table(output)
    assert list(rows) == ["seed 4", "seed 5", "seed 6", "mean ± sd", "lowest", "ensemble"]
    tests = [float(line[0]) for line in TEST_LINE.findall(output)]
    assert [float(rows[f"seed {seed}"].split()[1][:-1]) for seed in (4, 5, 6)] == tests
    mean, _, spread = rows["mean ± sd"].split()[3:]
    assert float(mean[:-1]) == pytest.approx(sum(tests) / 3, abs=0.01)
    assert float(spread[:-1]) == pytest.approx(torch.tensor(tests).std().item(), abs=0.01)
    assert float(rows["lowest"].split()[1][:-1]) == min(tests)

    # The saved files give the ensemble's accuracy.
    images, labels = (tensor[:1_000] for tensor in datafile.get_loaders()[2].dataset.tensors)
    classifiers = [checkpoint.load(tmp_path / f"best_Model_1_seed{seed}.pth") for seed in (4, 5, 6)]
    with torch.no_grad():
        together = sum(model(images).softmax(1) for model in classifiers)
    accuracy = (together.argmax(1) == labels).float().mean().item()
    assert float(rows["ensemble"][:-1]) == pytest.approx(100 * accuracy, abs=0.005)

    fit(*options, "--seed", 5, "--output-dir", "alone")
    alone = best_weights(tmp_path / "alone")["best_Model_1.pth"]
    assert same(alone, best_weights(tmp_path)["best_Model_1_seed5.pth"])

    rows = table(fit(*options, "--folds", 2, "--output-dir", "folds").stdout)
    assert list(rows) == ["fold 1", "fold 2", "mean ± sd", "lowest", "ensemble"]
    assert set(best_weights(tmp_path / "folds")) == {"best_Model_1_fold1.pth", "best_Model_1_fold2.pth"}
    process = fit(*options, "--folds", 3, "--output-dir", "folds", "--resume", check=False)
    assert "was saved with --folds 2 (fold 1), not --folds 3 (fold 1): " in process.stderr


MISTAKES = [
    (["--epochs", "0"], 2, "argument --epochs: must be between 1 and 1,000,000, not 0"),
    (["--epochs", "two"], 2, "argument --epochs: invalid integer value: 'two'"),
    (["--batch-size", "0"], 2, "argument --batch-size: must be between 1 and 1,000,000, not 0"),
    (["--batch-size", "1000001"], 2, "--batch-size: must be between 1 and 1,000,000, not 1000001"),
    (["--lr", "nan"], 2, "argument --lr: must be greater than 0 and at most 1e30, not nan"),
    (["--lr", "1.1e30"], 2, "argument --lr: must be greater than 0 and at most 1e30, not 1.1e30"),
    (["--lr", "0"], 2, "argument --lr: must be greater than 0 and at most 1e30, not 0"),
    (["--seed", "-1"], 2, f"argument --seed: must be between 0 and {2**62:,}, not -1"),
    (["--early-stopping", "0"], 2, "--early-stopping: must be between 1 and 1,000,000, not 0"),
    (["--runs", "1"], 2, "argument --runs: must be between 2 and 1,000, not 1"),
    (["--folds", "1001"], 2, "argument --folds: must be between 2 and 1,000, not 1001"),
    (["--data-dir", ""], 2, "argument --data-dir: must not be empty"),
    (["--runs", "2", "--folds", "2"], 2, "--folds"),
    (["--model", "Model_99"], 2, "Model_99"),
    (["--device", "abacus"], 2, "abacus"),
    (["--device", "cuda:99"], 2, "cuda:99"),
    (["--device", "hpu"], 2, "hpu"),
    (["--device", "meta"], 2, "meta"),
    (["--output-dir", "a_file"], 1, "a_file is not a directory"),
    (["--output-dir", "a_link"], 1, "a_link is a link to a directory that does not exist"),
    (["--data-dir", "nowhere"], 1, "nowhere: no such directory; create it to download MNIST there"),
    (["--data-dir", "broken"], 1, "train-images-idx3-ubyte"),
    (["--folds", "2", "--data-dir", "one"], 1, "1 training images; fold 1 of 2 leaves 0 for training"),
    (["--data-dir", "one"], 1, "one has 1 training images; one twelfth for validation leaves 1 for training"),
    (["--frobnicate"], 2, "--frobnicate"),
]


if os.name == "nt":  # links need a privilege there
    MISTAKES = [mistake for mistake in MISTAKES if "a_link" not in mistake[0]]


@pytest.mark.parametrize("arguments, status, named", MISTAKES, ids=lambda value: str(value))
def test_a_usage_error_is_one_line_and_changes_nothing(arguments, status, named, tmp_path, call):
    (tmp_path / "a_file").write_text("mine")
    if "a_link" in arguments:
        (tmp_path / "a_link").symlink_to("nowhere")
    (tmp_path / "best_Model_3.pth").write_text("mine too")
    raw_dir = tmp_path / "broken" / "MNIST" / "raw"
    raw_dir.mkdir(parents=True)
    (tmp_path / "one").mkdir()
    for name in datafile.FILES:
        (raw_dir / name).write_bytes(b"not MNIST")
        shape = (1, 28, 28) if "images" in name else (1,)
        write_idx(tmp_path / "one" / name, torch.zeros(shape, dtype=torch.uint8))

    process = call("train.py", *arguments, check=False)
    assert process.returncode == status and process.stdout == ""
    *usage, sentence = process.stderr.splitlines()
    assert not usage if status == 1 else usage[0].startswith("usage: ")
    assert sentence.startswith("train.py: error: ") and named in sentence
    assert (tmp_path / "a_file").read_text() == "mine"
    assert (tmp_path / "best_Model_3.pth").read_text() == "mine too"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best_model(fit, tmp_path):
    (tmp_path / "best_Model_1.pth").write_text("mine")
    process = fit("--model", "Model_1", "--lr", "1e30", check=False)
    assert process.returncode == 1
    sentence = r"train.py: error: the loss became (nan|inf) in epoch 1: try a lower --lr\n"
    assert re.fullmatch(sentence, process.stderr)
    assert (tmp_path / "best_Model_1.1.pth").read_text() == "mine"


def test_weights_whose_logits_are_not_finite_are_not_saved(fit, tmp_path):
    """The only step of the epoch has a finite loss, but makes the logits infinite."""
    process = fit("--model", "Model_1", "--lr", "1e30", "--batch-size", 2_000, check=False)
    sentence = "train.py: error: the model's logits are not finite"
    assert process.returncode == 1 and process.stderr.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_main_can_be_called_again_and_in_a_thread(fit):
    for _ in range(2):
        fit("--model", "Model_1", "--epochs", 1)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(fit("--model", "Model_1", "--epochs", 1).stdout))
    thread.start()
    thread.join()
    assert len(BLOCK.findall(outputs[0])) == 1


def test_in_ascii_and_with_torchruns_leftovers_it_runs(run, small_data):
    environment = ONE_THREAD | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    environment |= {"PYTHONIOENCODING": "ascii"}
    options = "--model", "Model_1", "--epochs", 1, "--runs", 2, "--data-dir", small_data, "--device", "cpu"
    output = run("train.py", *options, env=environment).stdout
    assert len(BLOCK.findall(output)) == 2 and re.search(r"mean \? sd .* \? .*\n.*\nensemble", output)


def test_an_older_python_is_a_one_line_error():
    code = f"import sys, runpy; sys.version_info = (3, 9, 1); sys.path.insert(0, {str(ROOT)!r}); "
    for script in "train.py", "evaluate.py":
        run_script = f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
        process = subprocess.run([sys.executable, "-c", code + run_script], capture_output=True, text=True)
        assert process.returncode == 1
        assert process.stderr == "this project needs Python 3.10 or newer; this is Python 3.9\n"


def test_python_3_10_is_new_enough(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    runpy.run_path(str(ROOT / "support" / "startup.py"))


def test_recipes_and_optimizers_are_those_described():
    assert train.RECIPES == {"Model_1": (2, 0.01), "Model_2": (12, 0.005), "Model_3": (15, 0.01)}
    assert train.Recipe() == (15, 0.01)
    create, multiple = train.OPTIMIZERS["sgd"]
    (group,) = create(models.Model_1().parameters(), lr=0.1).param_groups
    assert group["momentum"] == 0.9 and group["nesterov"] is True
    assert [layer.p for layer in models.Model_3() if isinstance(layer, torch.nn.Dropout)] == [0.1]


def test_an_epoch_records_the_mean_validation_loss_and_steps_the_scheduler_by_the_accuracy(
    small_data, monkeypatch
):
    args = train.parse_args(["--model", "Model_1", "--device", "cpu", "--data-dir", str(small_data)])
    args.device = torch.device("cpu")
    loaders = datafile.get_loaders(data_dir=small_data)
    state = train.create_training_state("Model_1", args, 0, None, loaders)
    stepped = []
    monkeypatch.setattr(state.scheduler, "step", stepped.append)
    train.run_epoch(state, loaders, augmented=True)
    images, labels = loaders.validation.dataset.tensors
    with torch.no_grad():
        logits = state.average_model.eval()(images)
    (metrics,) = state.history
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics["validation_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    correct = (logits.argmax(1) == labels).float().mean().item()
    assert metrics["validation_accuracy"] == pytest.approx(correct)
    assert stepped == [metrics["validation_accuracy"]]


def test_the_weights_do_not_depend_on_whether_the_table_is_printed(fit, tmp_path, monkeypatch):
    fit("--epochs", 1, "--output-dir", "with")
    monkeypatch.setattr("support.metrics.summary", lambda *arguments, **options: None)
    fit("--epochs", 1, "--output-dir", "without")
    first, second = (saved_states(tmp_path / folder)["best_Model_3.pth"] for folder in ("with", "without"))
    assert same(first, second)


def test_the_table_of_layers_is_printed_once_for_all_runs(fit):
    output = fit("--model", "Model_1", "--epochs", 1, "--runs", 2).stdout
    assert output.count("\nParameters: 26,698\n") == 1 and output.count("Epoch: 1/1") == 2


def test_a_narrow_terminal_shows_loss_and_accuracy(small_data, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(
        train, "tqdm", lambda *arguments, **options: bars.append(options) or tqdm(*arguments, disable=True)
    )
    args = train.parse_args(["--model", "Model_1", "--epochs", "1", "--data-dir", str(small_data)])
    args.device, args.output_dir = torch.device("cpu"), tmp_path
    train.train("Model_1", args, 0)
    assert bars[0]["dynamic_ncols"] is True
    words = {"prefix": "Epoch 12", "postfix": "loss 0.293, 92.11%", "bar_format": bars[0]["bar_format"]}
    text = tqdm.format_meter(200, 430, 3.0, ncols=40, **words)
    assert "loss 0.293, 92.11%" in text and len(text) <= 40


def test_resuming_with_another_data_set_is_rejected(fit, small_data, tmp_path):
    fit("--model", "Model_1", "--epochs", 1)
    other = shutil.copytree(small_data, tmp_path / "other")
    path = other / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[20] ^= 255
    path.write_bytes(content)
    process = fit("--model", "Model_1", "--epochs", 2, "--resume", "--data-dir", other, check=False)
    assert process.returncode == 1 and "was saved with other images in --data-dir: " in process.stderr


def test_each_flag_but_those_that_change_no_weights_must_be_the_same_at_resume(state_for):
    """A new flag is compared unless it is named in `RESUMABLE`."""
    flags = vars(train.parse_args([])).keys() - set(train.RESUMABLE)
    compared = {"model", "batch_size", "optimizer", "lr", "augment", "seed"}
    assert flags == compared and state_for().settings.keys() == compared | {"data_dir"}


@pytest.fixture
def state_for(small_data):
    """Returns a function that creates the training state for command-line arguments, and its loaders."""

    def state_for(*arguments, seed=0):
        args = train.parse_args(["--device", "cpu", "--data-dir", str(small_data), *arguments])
        loaders = datafile.get_loaders(data_dir=small_data)
        return train.create_training_state("Model_3", args, seed, None, loaders)

    return state_for


def test_the_optimizer_is_the_one_named_with_its_default_rate(state_for):
    for name, kind, lr in (
        ("adam", torch.optim.Adam, 0.01),
        ("adamw", torch.optim.AdamW, 0.01),
        ("nadam", torch.optim.NAdam, 0.01),
        ("radam", torch.optim.RAdam, 0.01),
        ("sgd", torch.optim.SGD, 0.05),
    ):
        optimizer = state_for("--optimizer", name).optimizer
        (group,) = optimizer.param_groups
        assert type(optimizer) is kind and group["lr"] == pytest.approx(lr)
        assert group.get("fused", True)  # NAdam and RAdam have no fused implementation
    assert state_for("--lr", "0.3").optimizer.param_groups[0]["lr"] == 0.3


def test_the_scheduler_lowers_the_rate_tenfold_after_four_epochs_without_a_higher_accuracy(state_for):
    state = state_for()
    rate = state.optimizer.param_groups[0]
    for accuracy in 0.5, 0.6, 0.7, 0.8, 0.9, 0.91, 0.92, 0.8, 0.7, 0.6:
        state.scheduler.step(accuracy)
        assert rate["lr"] == 0.01
    state.scheduler.step(0.5)
    assert rate["lr"] == pytest.approx(0.001)


def test_the_seed_determines_the_initialization(state_for):
    first, again, other = (state_for(seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert same(first, again)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_the_kept_epoch_is_the_one_tested_and_reported(fit, tmp_path, monkeypatch):
    """Even if it is the first of three."""
    results = []
    monkeypatch.setattr(checkpoint, "epoch_to_keep", lambda history: 1)
    monkeypatch.setattr(train, "print_runs", lambda name, runs: results.extend(runs.values()))
    output = fit("--model", "Model_1", "--epochs", 3, "--runs", 2).stdout
    images, labels = (tensor[:1_000] for tensor in datafile.get_test_loader()[0].dataset.tensors)
    for seed, line in enumerate(TEST_LINE.findall(output)):
        model = checkpoint.load(tmp_path / f"best_Model_1_seed{seed}.pth")
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        history = checkpoint.read(tmp_path / f"last_Model_1_seed{seed}.pth")["state"]["history"]
        assert line[1] == "1" and float(line[0]) == pytest.approx(100 * accuracy, abs=0.006)
        assert results[seed][:2] == (history[0]["validation_accuracy"], pytest.approx(accuracy))


def test_an_epoch_is_saved_before_it_is_printed(fit, monkeypatch):
    order, save, show = [], checkpoint.TrainingState.save, train.print_epoch
    monkeypatch.setattr(checkpoint.TrainingState, "save", lambda *given: order.append("save") or save(*given))
    monkeypatch.setattr(train, "print_epoch", lambda *given: order.append("print") or show(*given))
    fit("--model", "Model_1", "--epochs", 2)
    assert order == ["save", "print"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_draws_a_bar_and_reads_the_loss_every_50_steps(epoch, monkeypatch, rank):
    bars = []
    monkeypatch.setattr(train.distributed, "RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        train, "tqdm", lambda *given, disable, **options: bars.append(disable) or tqdm(*given, disable=True)
    )
    with Reads() as reads:
        epoch(120)
    assert bars == [rank == 1]
    assert reads.count == (2 if rank else 6)  # the loss and the accuracy, at steps 50 and 100 and at the end
