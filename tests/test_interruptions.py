"""Real runs that are killed, stopped by signals, out of disk space, or two at once."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from models import checkpoint
from test_checkpoint import same
from test_train import BLOCK, TEST_LINE

SMALL = ROOT / "tests" / "train_small.py"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path, tmp_path_factory, small_data):
    """Starts train.py on the small data with these arguments, its output going to files."""
    logs = tmp_path_factory.mktemp("logs")
    processes = []

    def start(*arguments, script=SMALL, data_dir=small_data, **options):
        command = [sys.executable, script, "--data-dir", data_dir, "--device", "cpu", *map(str, arguments)]
        paths = [logs / f"{len(processes)}.{stream}" for stream in ("out", "err")]
        with paths[0].open("w") as out, paths[1].open("w") as err:
            pipes = {"stdout": out, "stderr": err}
            process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **pipes, **options)
        process.printed = lambda: tuple(path.read_text() for path in paths)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def end(process):
    """Waits for the process; returns what it printed on standard output and on standard error."""
    process.wait(timeout=300)
    return process.printed()


def wait_for(process, text):
    """Waits until the process has begun a line with this."""
    while f"\n{text}" not in "\n" + process.printed()[0]:
        assert process.poll() is None, process.printed()
        time.sleep(0.005)


def checked_states(folder):
    """Reads every file in the folder that has its final name, each of which must be whole."""
    return {path.name: checkpoint.read(path) for path in sorted(folder.glob("[!.]*"))}


def survive(start, folder, kills, *arguments, **options):
    """Kills runs and resumes them until that many were killed; they must end as if none had been.

    Every other kill comes within milliseconds after something in the folder changed.
    """
    process = start(*arguments, "--output-dir", folder / "whole", **options)
    output, errors = end(process)
    assert process.returncode == 0, errors
    blocks, last_line = BLOCK.findall(output), TEST_LINE.search(output)[0].splitlines()[0]
    expected = checked_states(folder / "whole")

    moments = random.Random(0)
    killed = finished = 0
    while killed < kills:
        output_dir = folder / f"killed_{finished}"
        output_dir.mkdir()
        output = ""
        while True:
            process = start(*arguments, "--output-dir", output_dir, "--resume", **options)
            wait_for(process, "Images")
            aimed = killed % 2
            for _ in range(moments.randint(1, 10) * aimed):  # an epoch changes the folder 2 or 4 times
                before = output_dir.stat().st_mtime_ns
                while process.poll() is None and output_dir.stat().st_mtime_ns == before:
                    pass
            time.sleep(moments.uniform(0, 0.005 if aimed else 3))
            process.kill()
            output += end(process)[0]
            states = checked_states(output_dir)
            if process.returncode == 0:
                break
            killed += 1
        finished += 1
        assert same(states, expected)
        assert sorted({block[0]: block for block in BLOCK.findall(output)}.values()) == blocks
        assert last_line in output


def test_a_killed_run_resumes_to_the_same_bits(start, tmp_path):
    survive(start, tmp_path, 4, "--epochs", 3)


@pytest.mark.slow
def test_fifty_killed_runs_resume_to_the_same_bits(start, tmp_path):
    survive(start, tmp_path, 50, "--epochs", 4)


@pytest.mark.slow
def test_killed_runs_on_all_of_mnist_resume_to_the_same_bits(start, tmp_path):
    options = "--model", "Model_2", "--epochs", 3
    survive(start, tmp_path, 5, *options, script=ROOT / "train.py", data_dir=ROOT / "data")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_with_one_line_that_says_how_to_go_on(start, tmp_path, name):
    number = getattr(signal, name)
    # Tests that run in the background, or under nohup, have some signals ignored.
    process = start("--epochs", 1_000, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    wait_for(process, "Epoch: 2/")
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(number)
    _, errors = end(process)
    assert process.returncode == 128 + number
    epoch = len(checkpoint.read(tmp_path / "last_Model_3.pth")["history"])
    assert errors.startswith(f"{name}: epoch {epoch} is saved in last_Model_3.pth; go on with: python ")
    assert errors.endswith(" --epochs 1000 --resume\n") and errors.count("\n") == 1

    process = start("--epochs", epoch + 1, "--resume")
    output, errors = end(process)
    assert process.returncode == 0, errors
    assert f"last_Model_3.pth is resumed after epoch {epoch}\n" in output
    assert [block[0] for block in BLOCK.findall(output)] == [str(epoch + 1)]


def test_a_signal_before_the_first_epoch_ends_says_that_nothing_is_saved(start, tmp_path):
    process = start()
    wait_for(process, "Model_3")
    process.terminate()
    _, errors = end(process)
    assert process.returncode == 143
    assert errors.startswith("SIGTERM: nothing of this run is saved yet; ")
    assert list(tmp_path.iterdir()) == []


def test_nohup_still_works(start):
    process = start("--epochs", 2, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(process, "Images")
    process.send_signal(signal.SIGHUP)
    output, errors = end(process)
    assert process.returncode == 0, errors
    assert len(BLOCK.findall(output)) == 2


def test_resuming_nothing_starts_and_resuming_the_end_says_so(start, tmp_path):
    first, second = (end(start("--epochs", 1, "--resume"))[0] for _ in range(2))
    assert "There is no last_Model_3.pth to resume: starting from the beginning\n" in first
    assert "last_Model_3.pth is finished after epoch 1\n" in second
    assert BLOCK.findall(second) == []
    test_accuracies = {TEST_LINE.search(output)[1] for output in (first, second)}
    assert len(test_accuracies) == 1


def test_early_stopping_counts_across_an_interruption(start):
    """At a rate of 1e-12 no epoch is better than the first."""
    options = "--model", "Model_1", "--lr", "1e-12", "--early-stopping", 3, "--resume"
    assert "Stopped early" not in end(start(*options, "--epochs", 2))[0]
    output = end(start(*options, "--epochs", 9))[0]
    assert [block[0] for block in BLOCK.findall(output)] == ["3", "4"]
    assert "Stopped early: no better epoch in the last 3\n" in output
    output = end(start(*options, "--epochs", 9))[0]
    assert BLOCK.findall(output) == [] and "last_Model_1.pth is finished after epoch 4\n" in output


def test_a_contradicting_flag_is_one_sentence(start, tmp_path):
    end(start("--epochs", 1))
    before = checked_states(tmp_path)
    process = start("--epochs", 2, "--resume", "--seed", 3)
    _, errors = end(process)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert "last_Model_3.pth is of a run with --seed 0, not 3" in errors
    assert same(checked_states(tmp_path), before)


def test_a_new_run_keeps_the_best_model_of_an_earlier_one(start, tmp_path):
    end(start("--epochs", 2))
    earlier = checkpoint.read(tmp_path / "best_Model_3.pth")
    output = end(start("--epochs", 1, "--seed", 1))[0]
    assert output.count("best_Model_3.pth of an earlier run is now best_Model_3.1.pth\n") == 1
    assert same(checkpoint.read(tmp_path / "best_Model_3.1.pth"), earlier)
    assert not same(checkpoint.read(tmp_path / "best_Model_3.pth"), earlier)


def test_of_two_runs_in_one_folder_the_second_says_so_and_stops(start, tmp_path):
    first = start("--epochs", 1_000)
    wait_for(first, "Images")
    second = start("--epochs", 1)
    output, errors = end(second)
    assert (second.returncode, output) == (1, "")
    assert errors.startswith("train.py: error: another run is writing to ") and errors.count("\n") == 1
    elsewhere = start("--epochs", 1, "--output-dir", "elsewhere")
    end(elsewhere)
    assert elsewhere.returncode == 0
    first.kill()
    first.wait()
    third = start("--epochs", 1)
    assert end(third)[1] == "" and third.returncode == 0  # a dead run locks nothing


def test_temporary_files_of_a_killed_run_are_removed_and_nothing_else(start, tmp_path):
    mine = ["notes.tmp", ".best_Model_1.pth.tmp", ".best_Model_3.pth.tmp~", "best_Model_3.pth.tmp"]
    for name in [*mine, ".best_Model_3.pth.tmp", ".last_Model_3.pth.tmp"]:
        (tmp_path / name).write_text("half a file")
    end(start("--epochs", 1))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*mine, "best_Model_3.pth", "last_Model_3.pth"}


@pytest.mark.parametrize(
    "epochs_before, limit, file",
    [(0, 8_192, "last"), (0, 65_536, "last"), (1, 8_192, "best"), (1, 65_536, "last")],
)
def test_a_full_disk_is_one_sentence_at_every_write(start, tmp_path, epochs_before, limit, file):
    """The best model takes 30,000 bytes, the training state 160,000."""
    if epochs_before:
        end(start("--epochs", epochs_before))
    before = checked_states(tmp_path)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start("--epochs", 3, "--resume", preexec_fn=limited)
    _, errors = end(process)
    assert process.returncode == 1
    assert errors == f"train.py: error: {file}_Model_3.pth could not be written (File too large)\n"
    assert same(checked_states(tmp_path), before)


def test_too_large_a_batch_is_one_sentence(start):
    """The whole training set in one batch does not fit in the memory that is allowed."""

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30))

    options = {"script": ROOT / "train.py", "data_dir": ROOT / "data", "preexec_fn": limited}
    process = start("--batch-size", 60_000, **options)
    _, errors = end(process)
    assert process.returncode == 1
    assert errors == "train.py: error: cpu has too little memory: try a smaller --batch-size\n"


def test_a_resumed_run_is_on_the_state_it_saved(start, tmp_path):
    """Of a best model that is newer than the training state, the state's own takes the place."""
    end(start("--epochs", 2))
    state = checkpoint.read(tmp_path / "last_Model_3.pth")
    checkpoint.save({key: torch.zeros_like(value) for key, value in state["best"].items()}, tmp_path / "b")
    (tmp_path / "b").replace(tmp_path / "best_Model_3.pth")
    end(start("--epochs", 2, "--resume"))
    assert same(checkpoint.read(tmp_path / "best_Model_3.pth"), state["best"])
