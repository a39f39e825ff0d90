"""What a run does with signals, streams, folders and workers that are not as it expects them."""

import fcntl
import importlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import train
from conftest import BLOCK, ONE_THREAD, ROOT, end, same, saved_states, wait_for
from support import checkpoint, process, startup


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_with_one_line_that_says_how_to_go_on(start, tmp_path, name):
    number = getattr(signal, name)
    # Tests that run in the background, or under nohup, have some signals ignored.
    running = start("--epochs", 1_000, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    wait_for(running, "Epoch: 2/")
    time.sleep(random.uniform(0, 0.5))
    running.send_signal(number)
    _, errors = end(running)
    assert running.returncode == 128 + number
    epoch = len(checkpoint.read(tmp_path / "last_Model_3.pth")["history"])
    assert errors.startswith(f"{name}: epoch {epoch} is saved in last_Model_3.pth; go on with: python ")
    assert errors.endswith(" --epochs 1000 --resume\n") and errors.count("\n") == 1

    running = start("--epochs", epoch + 1, "--resume")
    output, errors = end(running)
    assert running.returncode == 0, errors
    assert f"last_Model_3.pth is resumed after epoch {epoch}\n" in output
    assert [block[0] for block in BLOCK.findall(output)] == [str(epoch + 1)]


def test_what_a_run_prints_that_was_killed_in_its_first_epoch_can_be_typed(fit, start, tmp_path):
    """Although the state of an earlier run, with other flags, is in the folder."""
    fit("--epochs", 1)
    earlier = saved_states(tmp_path)["last_Model_3.pth"]
    running = start("--seed", 1, "--epochs", 1, "--data-dir", ROOT / "data")  # an epoch of some seconds
    wait_for(running, "last_Model_3.pth is not of this run: it is now last_Model_3.1.pth\n")
    running.terminate()
    _, errors = end(running)
    assert running.returncode == 143
    sentence, _, command = errors.partition("; go on with: python ")
    assert sentence == "SIGTERM: nothing of this run is saved yet"
    arguments = command.replace(str(ROOT / "data"), "{data}").split()[1:]
    output = fit(*arguments[arguments.index("--seed") :][:4], "--resume").stdout
    assert "There is no last_Model_3.pth to resume" in output and "seed 1" in output
    assert saved_states(tmp_path)["last_Model_3.1.pth"]["settings"] == earlier["settings"]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(start, name):
    """As under nohup, and in the background of a script."""
    number = getattr(signal, name)
    running = start("--model", "Model_1", preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    while running.poll() is None:  # from the first moment on, imports included
        running.send_signal(number)
        time.sleep(0.02)
    output, errors = end(running)
    assert (running.returncode, errors) == (0, "")
    assert len(BLOCK.findall(output)) == 2


def test_ctrl_c_during_the_imports_leaves_no_traceback(start):
    running = start(before=[sys.executable, "-X", "importtime"], stderr=subprocess.PIPE)
    for line in running.stderr:
        if b"torch._C" in line:
            break
    running.send_signal(signal.SIGINT)
    errors = running.stderr.read().decode()
    assert running.wait() == -signal.SIGINT and "Traceback" not in errors and "Interrupt" not in errors


def notebook(*cells, cwd):
    """Runs cells in a real kernel; returns what each printed, errors included."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, allow_errors=True, resources={"metadata": {"path": cwd}}).execute()
    return [
        "".join(output.get("text", output.get("evalue", "")) for output in cell.outputs)
        for cell in book.cells
    ]


def test_both_scripts_run_in_a_notebook_and_leave_it_as_it_was(tmp_path, small_data):
    state = "[(signal.getsignal(n), sys.stdout) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]"
    options = f"--model Model_1 --epochs 1 --device cpu --data-dir {small_data}"
    interrupt = (
        "import threading; threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start(); "
        "import time; time.sleep(30)"
    )
    outputs = notebook(
        f"import os, signal, sys; before = {state}",
        f"%run {ROOT}/train.py {options}",
        f"%run {ROOT}/train.py {options} --resume",
        f"%run {ROOT}/evaluate.py best_Model_1.pth --device cpu --data-dir {small_data}",
        f"print({state} == before)",
        interrupt,
        "print('the kernel lives')",
        cwd=tmp_path,
    )
    assert len(BLOCK.findall(outputs[1])) == 1, outputs[1]
    assert "last_Model_1.pth is finished after epoch 1" in outputs[2]
    assert "best_Model_1.pth: Model_1, 26,698 parameters\nTest Accuracy: " in outputs[3]
    assert outputs[4] == "True\n"
    assert outputs[5] == "" or "KeyboardInterrupt" in outputs[5]
    assert outputs[6] == "the kernel lives\n"


def test_a_stream_that_cannot_encode_a_character_gets_another(run, trained, small_data, tmp_path):
    ascii_only = ONE_THREAD | {"PYTHONIOENCODING": "ascii"}
    options = "--model", "Model_1", "--epochs", 1, "--runs", 2, "--data-dir", small_data, "--device", "cpu"
    assert re.search(r"mean \? sd .* \? .*\n.*\nensemble", run("train.py", *options, env=ascii_only).stdout)
    for name in "ä.png", "b.png":
        (tmp_path / name).write_bytes((ROOT / "tests" / "pictures" / "mistakes.png").read_bytes())
    model = trained / "best_Model_1.pth"
    output = run("evaluate.py", model, "--images", "ä.png", "b.png", env=ascii_only).stdout
    assert [line[0] for line in output.splitlines()] == ["?", "b"]


def shell(command, tmp_path):
    return subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True
    )


def test_a_standard_output_that_is_closed_or_goes_away_is_named(small_data, tmp_path):
    options = f"--model Model_1 --epochs 3 --data-dir {small_data} --device cpu"
    command = f"{sys.executable} {ROOT}/train.py {options}"
    ended = shell(f"{command} >&-", tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("train.py: error: standard output is closed: ")
    assert ended.stderr.count("\n") == 1

    ended = shell(f"{command} >/dev/full; exit $?", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "train.py: error: standard output takes no more (No space left on device)\n"

    ended = shell(f"{command} | grep -m 1 -A 1 Epoch; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "train.py: error: standard output takes no more (Broken pipe)\n"
    epochs = [int(epoch) for epoch in re.findall(r"Epoch: (\d+)/3", ended.stdout)]
    assert len(saved_states(tmp_path)["last_Model_1.pth"]["history"]) >= max(epochs)  # saved, then printed


def test_without_standard_error_it_trains_without_a_bar(small_data, tmp_path, trained):
    options = f"--model Model_1 --epochs 1 --data-dir {small_data} --device cpu"
    ended = shell(f"{sys.executable} {ROOT}/train.py {options} 2>&-", tmp_path)
    assert ended.returncode == 0 and len(BLOCK.findall(ended.stdout)) == 1
    command = f"{sys.executable} {ROOT}/evaluate.py {trained}/best_Model_1.pth --images missing.png 2>&-"
    ended = shell(command, tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_of_two_runs_in_one_folder_the_second_says_so_and_stops(start, fit, tmp_path):
    first = start("--epochs", 1_000)
    wait_for(first, "Images")
    second = fit("--epochs", 1, check=False)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("train.py: error: another run is writing to ")
    assert second.stderr.count("\n") == 1
    fit("--epochs", 1, "--output-dir", "elsewhere")
    first.kill()
    first.wait()
    assert fit("--epochs", 1).stderr == ""  # a dead run locks nothing


def test_where_a_folder_cannot_be_locked_a_line_says_so(fit, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for error in process.errno.ENOTSUP, process.errno.ENOLCK, process.errno.ENOSYS:  # noqa: B007
        ended = fit("--model", "Model_1", "--epochs", 1)
        assert ended.stderr.startswith(". cannot be locked (") and ended.stderr.count("\n") == 1
    error = process.errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        fit("--model", "Model_1", "--epochs", 1)


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("a fault of the program"), False),
        (ImportError("another"), False),
    ],
    ids=repr,
)
def test_errors_are_told_by_their_types(fit, call, trained, monkeypatch, error, told):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(train, "train_epoch", fail)
    monkeypatch.setattr("evaluate.predict", fail)
    for run in (
        lambda: fit("--epochs", 1, check=False),
        lambda: call("evaluate.py", trained / "best_Model_1.pth", check=False),
    ):
        if told:
            assert "error: there is too little memory: try a smaller --batch-size" in run().stderr
        else:
            with pytest.raises(type(error)):
                run()


def test_too_large_a_batch_is_one_sentence(fit, monkeypatch):
    """PyTorch's own error for what no machine has."""
    monkeypatch.setattr(train, "augment", lambda images: images.new_empty(10**15))
    assert "there is too little memory" in fit("--epochs", 1, check=False).stderr


@pytest.mark.parametrize("found", ["device", "program"])
def test_a_gpu_that_is_there_and_is_not_used_is_named_before_training(fit, call, trained, monkeypatch, found):
    if torch.cuda.is_available():
        pytest.skip("here it is used")
    if found == "device":
        monkeypatch.setattr(process, "NVIDIA", Path("/dev/null"))
    else:
        monkeypatch.setattr(process.shutil, "which", lambda name: f"/usr/bin/{name}")
    line = r"there is an NVIDIA GPU here, but PyTorch cannot use it: \S.*\n"
    assert re.fullmatch(line, fit("--model", "Model_1", "--epochs", 1).stderr)
    options = "--device", "cpu", "--images", "missing.png"
    assert re.match(line, call("evaluate.py", trained / "best_Model_1.pth", *options, check=False).stderr)


@pytest.mark.parametrize(
    "environment, script, is_notebook, changed",
    [
        ({}, ROOT / "train.py", False, True),
        ({"OMP_NUM_THREADS": "1"}, ROOT / "train.py", False, False),  # torchrun sets it too
        ({"GOMP_SPINCOUNT": "1"}, ROOT / "train.py", False, False),
        ({"KMP_AFFINITY": "none"}, ROOT / "train.py", False, False),
        ({}, ROOT / "train.py", True, False),
        ({}, Path(pytest.__file__), False, False),
    ],
)
def test_threads_are_kept_on_their_cores_where_nobody_has_said_otherwise(
    monkeypatch, environment, script, is_notebook, changed
):
    for name in list(os.environ):
        if name.startswith(("OMP_", "GOMP_", "KMP_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # to be put back
    if is_notebook:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    importlib.reload(startup)
    on_linux = sys.platform == "linux" and not process.NVIDIA.exists()
    assert dict(os.environ) == before | (startup.THREADS if changed and on_linux else {})
    for name in startup.THREADS.keys() - before.keys():
        os.environ.pop(name, None)


def workers(number, folder, small_data, *arguments):
    """Starts a number of torchrun's workers on the small data."""
    command = sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"
    options = "--model", "Model_1", "--data-dir", small_data, "--device", "cpu", *arguments
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*command, ROOT / "train.py", *map(str, options)]
    return subprocess.Popen(command, cwd=folder, env=ONE_THREAD, **pipes)


def weights(folder):
    return {name: state for name, state in saved_states(folder).items() if name.startswith("best")}


def test_workers_share_the_runs_and_give_the_bits_of_one(small_data, tmp_path):
    outputs = []
    for number in 1, 3:
        running = workers(number, tmp_path, small_data, "--epochs", 2, "--runs", 4, "--output-dir", number)
        output, errors = running.communicate()
        assert running.returncode == 0, errors
        outputs.append(output[output.index("\nModel_1   ") :])
    assert outputs[0] == outputs[1] and "ensemble" in outputs[0]
    assert same(weights(tmp_path / "1"), weights(tmp_path / "3"))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_costs_only_its_unfinished_run(small_data, fit, tmp_path):
    options = "--epochs", 25, "--runs", 3
    running = workers(2, tmp_path, small_data, *options, "--output-dir", "killed")
    while not (tmp_path / "killed" / "best_Model_1_seed1.pth").exists():
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(children(running.pid)[1], signal.SIGKILL)
    running.communicate()
    assert running.returncode != 0
    running = workers(2, tmp_path, small_data, *options, "--output-dir", "killed", "--resume")
    output, errors = running.communicate()
    assert running.returncode == 0, errors
    expected = fit("--model", "Model_1", *options, "--output-dir", "whole").stdout
    assert output[output.index("\nModel_1   ") :] == expected[expected.index("\nModel_1   ") :]
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_workers_do_not_share_a_single_run(small_data, tmp_path):
    running = workers(2, tmp_path, small_data)
    output, errors = running.communicate()
    assert running.returncode != 0 and output == ""
    assert "train.py: error: several workers need --runs or --folds: they do not share one run\n" in errors
    assert list(tmp_path.iterdir()) == []
