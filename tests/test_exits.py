"""Signals, streams, directories, devices and workers in unexpected states."""

import errno
import importlib
import os
import random
import re
import shutil
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
from conftest import BLOCK, ONE_THREAD, ROOT, WEIGHTS, best_weights, end, same, saved_states, wait_for
from support import checkpoint, devices, exits, files, flags, startup

posix = pytest.mark.skipif(os.name == "nt", reason="signals, locks and shells as on Linux and macOS")


@posix
def test_four_signals_interrupt_a_run():
    names = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"
    before = [signal.signal(getattr(signal, name), signal.SIG_DFL) for name in names]
    with exits.exit_on_signals():
        for name in names:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(getattr(signal, name))
    for name, handler in zip(names, before):
        assert signal.signal(getattr(signal, name), handler) is signal.SIG_DFL


@posix
def test_a_signal_ends_the_run_with_one_line_that_says_how_to_resume(start, fit, tmp_path):
    # Tests that run in the background have this signal ignored.
    running = start("--epochs", 1_000, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(running, "Epoch: 2/")
    time.sleep(random.uniform(0, 0.5))
    running.send_signal(signal.SIGINT)
    _, errors = end(running)
    assert running.returncode == 130
    epoch = len(checkpoint.read(tmp_path / "last_Model_3.pth")["state"]["history"])
    advice = "to resume, add --resume to the same command"
    # A signal between the two may leave the message an epoch behind the file.
    expected = [
        f"Interrupted: epoch {e} is saved in last_Model_3.pth; {advice}\n" for e in (epoch, epoch - 1)
    ]
    assert errors in expected

    output = fit("--epochs", epoch + 1, "--resume").stdout
    assert f"\nResuming from last_Model_3.pth (epoch {epoch})\n" in output
    assert [block[0] for block in BLOCK.findall(output)] == [str(epoch + 1)]


@posix
def test_a_run_killed_in_its_first_epoch_does_not_advise_to_resume(fit, start, tmp_path):
    """Although the state of an earlier run, with other flags, is in the directory."""
    fit("--epochs", 1)
    earlier = saved_states(tmp_path)["last_Model_3.pth"]
    running = start("--seed", 1, "--epochs", 1, "--data-dir", ROOT / "data")  # an epoch of some seconds
    wait_for(running, "Renamed existing last_Model_3.pth to last_Model_3.1.pth\n")
    running.terminate()
    _, errors = end(running)
    assert (running.returncode, errors) == (130, "Interrupted: nothing is saved yet\n")
    assert same(saved_states(tmp_path)["last_Model_3.1.pth"], earlier)


def test_each_line_appears_at_once_in_a_pipe(start, tmp_path):
    """A buffer of 8 KB would hold back some fifty epochs."""
    buffered = {name: value for name, value in ONE_THREAD.items() if name != "PYTHONUNBUFFERED"}
    running = start("--model", "Model_1", "--epochs", 1_000, env=buffered)
    wait_for(running, "Epoch: 1/")
    assert len(checkpoint.read(tmp_path / "last_Model_1.pth")["state"]["history"]) < 20


@posix
def test_signals_that_were_ignored_at_the_start_stay_ignored(start):
    """As with nohup, and in the background of a script."""
    ignored = signal.SIGHUP, signal.SIGINT

    def ignore():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    running = start("--model", "Model_1", preexec_fn=ignore)
    while running.poll() is None:  # from the start, imports included
        for number in ignored:
            running.send_signal(number)
        time.sleep(0.02)
    output, errors = end(running)
    assert (running.returncode, errors) == (0, "")
    assert len(BLOCK.findall(output)) == 2


@posix
def test_ctrl_c_during_the_imports_leaves_no_traceback(start):
    running = start(before=[sys.executable, "-X", "importtime"], stderr=subprocess.PIPE)
    for line in running.stderr:
        if b"torch._C" in line:
            break
    running.send_signal(signal.SIGINT)
    errors = running.stderr.read().decode()
    assert running.wait() == -signal.SIGINT and "Traceback" not in errors and "Interrupt" not in errors


def notebook(*cells, cwd):
    """Runs cells in a real kernel; returns the output of each, or the name of its exception."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=120, allow_errors=True, resources={"metadata": {"path": cwd}}).execute()
    texts = []
    for cell in book.cells:
        texts.append("".join(output.get("text") or output.get("ename", "") for output in cell.outputs))
    return texts


def test_both_scripts_run_in_a_notebook_and_leave_it_as_it_was(tmp_path, small_data):
    state = "[(signal.getsignal(n), sys.stdout) for n in (signal.SIGINT, signal.SIGTERM)]"
    options = f"--model Model_1 --epochs 1 --device cpu --data-dir {small_data}"
    outputs = notebook(
        f"import os, signal, sys; before = {state}",
        f"%run {ROOT}/train.py {options}",
        f"%run {ROOT}/train.py {options} --resume",
        f"%run {ROOT}/evaluate.py best_Model_1.pth --device cpu --data-dir {small_data}",
        f"print({state} == before)",
        "signal.raise_signal(signal.SIGINT)",
        "print('the kernel lives')",
        cwd=tmp_path,
    )
    assert len(BLOCK.findall(outputs[1])) == 1, outputs[1]
    assert "Resuming from last_Model_1.pth (epoch 1)" in outputs[2]
    assert "best_Model_1.pth: Model_1, 26,698 parameters\nTest Accuracy: " in outputs[3]
    assert outputs[4] == "True\n"
    assert outputs[5:] == ["KeyboardInterrupt", "the kernel lives\n"]


def test_a_stream_that_cannot_encode_a_character_gets_another(run, tmp_path):
    shutil.copy(ROOT / "support" / "pictures" / "nine.png", tmp_path / "ä.png")
    arguments = WEIGHTS / "Model_1.pth", "--images", "ä.png", "ö.png"
    ended = run("evaluate.py", *arguments, env=ONE_THREAD | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert ended.returncode == 1 and ended.stdout.startswith("?.png: 9 (")
    assert re.fullmatch(r"evaluate.py: error: \S+.png: no such file\n", ended.stderr)


def shell(command, tmp_path):
    options = {"cwd": tmp_path, "env": ONE_THREAD, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", command], **options)


@posix
def test_a_standard_output_that_fails_is_a_one_line_error_and_the_run_is_saved(small_data, tmp_path):
    options = f"--model Model_1 --epochs 3 --data-dir {small_data} --device cpu"
    command = f"{sys.executable} {ROOT}/train.py {options}"
    ended = shell(f"{command} >/dev/full; exit $?", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "train.py: error: standard output cannot be written (No space left on device)\n"

    ended = shell(f"{command} | grep -m 1 -A 1 Epoch; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert ended.returncode == 1
    saved = r"\(epoch \d is saved in last_Model_1.pth\)"
    assert re.fullmatch(rf"train.py: error: standard output was closed {saved}\n", ended.stderr)
    epochs = [int(epoch) for epoch in re.findall(r"Epoch: (\d+)/3", ended.stdout)]
    assert len(saved_states(tmp_path)["last_Model_1.pth"]["state"]["history"]) >= max(epochs)

    assert shell(f"{command} --output-dir closed >&- 2>&-", tmp_path).returncode == 0
    assert len(saved_states(tmp_path / "closed")["last_Model_1.pth"]["state"]["history"]) == 3


@posix
def test_a_second_run_in_one_directory_stops_with_a_message(start, fit, tmp_path):
    first = start("--epochs", 1_000)
    wait_for(first, "Images")
    second = fit("--epochs", 1, check=False)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("train.py: error: another run is writing to ")
    assert second.stderr.count("\n") == 1
    fit("--epochs", 1, "--output-dir", "elsewhere")
    first.kill()
    first.wait()
    assert fit("--epochs", 1).stderr == ""  # a terminated run holds no lock


@posix
def test_a_directory_that_cannot_be_locked_is_one_line_and_the_run_continues(fit, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    ended = fit("--model", "Model_1", "--epochs", 1)
    advice = "make sure that no other run writes there"
    assert ended.stderr == f"Cannot lock . ({os.strerror(errno.ENOTSUP)}): {advice}\n"


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("a fault of the program"), False),
        (ImportError("another"), False),
    ],
    ids=repr,
)
def test_only_expected_errors_are_one_line(fit, call, monkeypatch, error, expected):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(train, "train_epoch", fail)
    monkeypatch.setattr("evaluate.predict", fail)
    for run, advice in (
        (lambda: fit("--epochs", 1, check=False), "try a smaller --batch-size or another --device"),
        (lambda: call("evaluate.py", WEIGHTS / "Model_1.pth", check=False), "choose another --device"),
    ):
        if expected:
            assert f"error: out of memory: {advice}\n" in run().stderr
        else:
            with pytest.raises(type(error)):
                run()


def test_running_out_of_memory_while_a_graph_is_captured_is_a_one_line_error(capsys):
    """The end of the capture raises another exception, without a name of its own."""
    with pytest.raises(SystemExit) as ended, exits.exit_on_error(memory_advice="try less"):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert str(ended.value).endswith("error: out of memory: try less")


def test_what_one_run_has_saved_is_not_said_of_the_next(fit, monkeypatch, small_data):
    """Both in one process, as in a notebook."""
    fit("--model", "Model_1", "--epochs", 1)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupt)
    ended = fit("--model", "Model_1", "--epochs", 1, check=False)
    assert (ended.returncode, ended.stderr) == (130, "Interrupted: nothing is saved yet\n")


def test_a_worker_that_dies_is_one_line_for_the_others(monkeypatch):
    def fail(values, value):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(devices.distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(devices.distributed.dist, "all_gather_object", fail)
    with pytest.raises(exits.RunError, match="^another process of torchrun has stopped"):
        devices.distributed.barrier()


def test_a_batch_too_large_for_any_machine_is_a_one_line_error(fit, monkeypatch):
    """PyTorch's own error."""
    monkeypatch.setattr(train, "augment", lambda images, background: images.new_empty(10**15))
    assert "error: out of memory: " in fit("--epochs", 1, check=False).stderr


NO_DRIVER = RuntimeError("Found no NVIDIA driver on your system.\nMore lines")


@pytest.mark.parametrize(
    "error, has_gpu, visible, expected",
    [
        (None, False, None, ("cuda", "")),
        (NO_DRIVER, False, None, ("cpu", "")),
        (NO_DRIVER, True, None, ("cpu", "Running on the CPU: device 'cuda' is not available: Found no")),
        (NO_DRIVER, True, "-1", ("cpu", "")),
        (NO_DRIVER, True, "", ("cpu", "")),
    ],
)
def test_the_default_device_is_cuda_if_it_works_and_a_gpu_that_does_not_is_named_once(
    monkeypatch, capsys, error, has_gpu, visible, expected
):
    """Simulated: a tensor on CUDA is made, or fails as on a machine with this GPU and another build."""

    def zeros(*size, device):
        if error:
            raise error
        return torch.ones(())

    monkeypatch.setattr(devices.torch, "zeros", zeros)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if has_gpu else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_gpu))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.select_device().type == expected[0]
    line = capsys.readouterr().err
    assert line.startswith(expected[1]) and line.count("\n") == bool(expected[1])
    assert devices.select_device(torch.device("cpu")) == torch.device("cpu")
    assert capsys.readouterr().err == ""


def test_each_of_several_workers_gets_its_own_gpu_or_an_error(monkeypatch):
    """Simulated: four workers with two GPUs, then one whose GPU another program holds, then none at all."""
    chosen, asked = [], []

    def zeros(size, device):
        asked.append(device)
        if len(asked) > 8:
            raise RuntimeError("CUDA error: device is busy\nMore lines")
        return torch.ones(())

    monkeypatch.setattr(devices.torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(devices.distributed, "WORLD_SIZE", 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for rank in range(4):
        monkeypatch.setattr(devices.distributed, "LOCAL_RANK", rank)
        own = torch.device("cuda", rank % 2)
        assert devices.select_device(devices.parse_device("cuda")) == devices.select_device() == own
    assert chosen == [torch.device("cuda", index) for index in (0, 0, 1, 1, 0, 0, 1, 1)]
    assert set(asked) == {"cuda:0", "cuda:1"}  # never another's
    with pytest.raises(exits.RunError, match="device 'cuda:1' is not available: CUDA error: device is busy$"):
        devices.select_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.select_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "environment, script, is_notebook, changed",
    [
        ({}, ROOT / "train.py", False, True),
        pytest.param({}, Path("link") / "train.py", False, True, marks=posix),
        ({"OMP_NUM_THREADS": "1"}, ROOT / "train.py", False, False),  # torchrun sets it too
        ({"GOMP_SPINCOUNT": "1"}, ROOT / "train.py", False, False),
        ({"KMP_AFFINITY": "none"}, ROOT / "train.py", False, False),
        ({}, ROOT / "train.py", True, False),
        ({}, Path(pytest.__file__), False, False),
    ],
)
def test_threads_stop_spinning_unless_the_user_decides(
    monkeypatch, tmp_path, environment, script, is_notebook, changed
):
    if script.parent == Path("link"):
        monkeypatch.chdir(tmp_path)
        script.parent.symlink_to(ROOT)
    for name in list(os.environ):
        if name.startswith(("OMP_", "GOMP_", "KMP_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    if is_notebook:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    importlib.reload(startup)
    assert dict(os.environ) == before | ({"GOMP_SPINCOUNT": "1000"} if changed else {})
    if changed:
        del os.environ["GOMP_SPINCOUNT"]


def test_workers_wait_for_each_other_for_days(monkeypatch):
    options = {}
    monkeypatch.setattr(devices.distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(
        devices.distributed.dist, "init_process_group", lambda *_, **given: options.update(given)
    )
    monkeypatch.setattr(devices.distributed.dist, "destroy_process_group", lambda: None)
    with devices.distributed.process_group():
        pass
    assert options["timeout"].days >= 7


def test_paths_are_expanded_as_a_shell_does(tmp_path, monkeypatch, call):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    monkeypatch.chdir(tmp_path)
    for name in "b.pth", "a.pth", "[1].pth":
        (tmp_path / name).touch()
    assert flags.path_type("~/runs") == tmp_path / "runs" and flags.path_type("runs") == Path("runs")
    assert files.expand([Path("*.pth")]) == [Path("[1].pth"), Path("a.pth"), Path("b.pth")]
    assert files.expand([Path("[1].pth"), Path("missing.pth")]) == [Path("[1].pth"), Path("missing.pth")]
    ended = call("evaluate.py", "best_*.pth", check=False)
    assert ended.stderr == "evaluate.py: error: [Errno 2] No file matches this pattern: 'best_*.pth'\n"


@pytest.mark.parametrize("module", ["torch", "torchvision", "tqdm", "torchsummary"])
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_missing_module_is_a_one_line_error_with_the_command(module, script):
    code = "import importlib.util as u, runpy, sys; find = u.find_spec; "
    code += f"u.find_spec = lambda name, *rest: None if name == {module!r} else find(name, *rest); "
    code += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"{module} is not installed for this Python: ")
    assert f"{sys.executable} -m pip install -r requirements.txt" in ended.stderr


torchrun = pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv, which PyTorch for Windows lacks")


def workers(number, folder, small_data, *arguments):
    """Starts a number of torchrun's workers on the small data."""
    command = sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"
    options = "--model", "Model_1", "--data-dir", small_data, "--device", "cpu", *arguments
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*command, ROOT / "train.py", *map(str, options)]
    return subprocess.Popen(command, cwd=folder, env=ONE_THREAD, **pipes)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@torchrun
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_costs_only_its_unfinished_run(small_data, fit, tmp_path):
    options = "--epochs", 3, "--runs", 3
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
    assert same(best_weights(tmp_path / "killed"), best_weights(tmp_path / "whole"))


@pytest.mark.parametrize("rank, expected", [(0, ["check", "barrier"]), (1, ["barrier"])])
def test_one_of_the_workers_checks_the_data_before_the_others_read_it(fit, monkeypatch, rank, expected):
    """Only one of them may download; simulated, up to the point at which all have seen that it is there."""
    done = []

    def barrier():
        done.append("barrier")
        raise exits.RunError("all are here")

    monkeypatch.setattr(train.distributed, "LOCAL_RANK", rank)
    monkeypatch.setattr(train.distributed, "barrier", barrier)
    monkeypatch.setattr(train, "find_raw_dir", lambda data_dir: done.append("check"))
    assert fit("--runs", 2, check=False).stderr == "train.py: error: all are here\n"
    assert done == expected


def test_workers_do_not_share_a_single_run(call, monkeypatch):
    monkeypatch.setattr(devices.distributed, "WORLD_SIZE", 2)
    ended = call("train.py", check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert "train.py: error: torchrun with several processes requires --runs or --folds\n" in ended.stderr
