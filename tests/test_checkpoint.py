"""Weights and training states: intact files are restored bit for bit, all others are rejected."""

import contextlib
import copy
import errno
import os
import random
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

import models
import train
from conftest import BLOCK, ROOT, TEST_LINE, end, same, saved_states, wait_for
from support import checkpoint, files
from support.checkpoint import VERSION, CheckpointError, TrainingState
from support.exits import RunError
from support.metrics import accuracy

many = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def state_file(small_data, tmp_path_factory):
    """The training state that Model_3 saves after its first epoch."""
    folder = tmp_path_factory.mktemp("finished")
    options = "--data-dir", str(small_data), "--epochs", "1", "--device", "cpu", "--output-dir", str(folder)
    train.train("Model_3", train.parse_args(options), 0)
    return folder / "last_Model_3.pth"


@pytest.fixture(scope="module")
def file(state_file):
    """The contents of that file."""
    return torch.load(state_file, weights_only=True)


@pytest.fixture(scope="module")
def state(file):
    return file["state"]


def save(state, path):
    """Saves a state as this version would."""
    torch.save({"version": VERSION, "pytorch": "2.9.0", "state": state}, path)


def new_training(settings):
    """A run of Model_3 with these settings, before its first epoch."""
    model = models.Model_3()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=3)
    return TrainingState(model, optimizer, scheduler, torch.Generator(), settings)


def refusal(path, state, settings=None):
    """The one-line message with which the file is rejected; if it is not, it must contain this state."""
    training = new_training(settings or state["settings"])
    try:
        training.resume(path, path.with_name("best_of_it"))
        assert same(training.state_dict(), state)
    except (CheckpointError, OSError) as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence
        return sentence
    return None


def put(state, where, value):
    """A copy of nested containers with another value in this place."""
    if not where:
        return value
    state = copy.copy(state)
    state[where[0]] = put(state[where[0]], where[1:], value)
    return state


def test_a_state_is_restored_bit_for_bit(state_file, file, state):
    assert (file["version"], file["pytorch"]) == (VERSION, torch.__version__)
    assert refusal(state_file, state) is None


@many
@given(data=st.data())
def test_a_flipped_bit_is_rejected_or_changes_nothing(state_file, state, tmp_path, data):
    content = bytearray(state_file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped.pth").write_bytes(content)
    refusal(tmp_path / "flipped.pth", state)


@many
@given(data=st.data())
def test_a_flipped_bit_in_a_file_of_weights_is_rejected_or_changes_nothing(tmp_path, data):
    content = bytearray((ROOT / "models" / "weights" / "Model_3.pth").read_bytes())
    expected = checkpoint.load(ROOT / "models" / "weights" / "Model_3.pth").state_dict()
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped.pth").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert same(checkpoint.load(tmp_path / "flipped.pth").state_dict(), expected)


def test_a_model_is_loaded_for_evaluation_and_a_file_on_the_cpu(state_file, monkeypatch):
    assert not checkpoint.load(ROOT / "models" / "weights" / "Model_3.pth").training
    load = mock.Mock(wraps=torch.load)
    monkeypatch.setattr(torch, "load", load)
    checkpoint.read(state_file)
    assert load.call_args.kwargs == {"map_location": "cpu", "weights_only": True}


@many
@given(data=st.data())
def test_a_truncated_file_is_rejected(state_file, state, tmp_path, data):
    content = state_file.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert refusal(tmp_path / "cut.pth", state)


@many
@given(content=st.binary(max_size=300))
@example(b"PK\x03\x04")
@example(b"PK\x05\x06" + bytes(18))
@example(b"\x80\x02cposix\nsystem\nX\x06\x00\x00\x00exit 1\x85R.")
def test_random_bytes_are_rejected(state, tmp_path, content):
    (tmp_path / "bytes.pth").write_bytes(content)
    assert refusal(tmp_path / "bytes.pth", state)


VALUES = [None, True, -1, 2**70, 0.5, "text", [], {}, (), torch.zeros(3), torch.zeros(3, dtype=torch.int64)]


@many
@given(data=st.data())
def test_weights_of_another_shape_or_that_are_not_finite_are_rejected(state, tmp_path, data):
    tensors = {key: tensor for key, tensor in state["best"].items() if tensor.is_floating_point()}
    key = data.draw(st.sampled_from(list(tensors)))
    nan, infinite = tensors[key].clone(), tensors[key].clone()
    nan.view(-1)[-1], infinite.view(-1)[0] = float("nan"), float("-inf")
    wrong = [tensors[key][None], tensors[key][:-1], tensors[key].to("meta"), None, "text"]
    if "running" not in key:  # buffers may be infinite, as a causal mask is
        wrong += [nan, infinite]
    torch.save(state["best"] | {key: data.draw(st.sampled_from(wrong))}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match="not finite|does not contain the weights of"):
        checkpoint.load(tmp_path / "wrong.pth")


def test_a_state_that_pytorch_cannot_load_is_rejected_with_both_versions(state, tmp_path):
    save(put(state, ("optimizer", "param_groups"), []), tmp_path / "other.pth")
    sentence = f"cannot be loaded (saved with PyTorch 2.9.0, loaded with {torch.__version__})"
    assert sentence in refusal(tmp_path / "other.pth", state)


@pytest.mark.parametrize("value", [None, 5, "text", {}, torch.zeros(3)], ids=repr)
@pytest.mark.parametrize("part", ["settings", "model", "average_model", "optimizer", "random"])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_state_with_a_part_of_another_form_is_rejected(state, tmp_path, part, value):
    save(put(state, (part,), value), tmp_path / "other.pth")
    assert "cannot be loaded" in refusal(tmp_path / "other.pth", state)


def test_a_state_of_an_older_pytorch_without_an_option_of_the_optimizer_is_loaded(state, tmp_path):
    (group,) = state["optimizer"]["param_groups"]
    older = {key: value for key, value in group.items() if key != "decoupled_weight_decay"}
    save(put(state, ("optimizer", "param_groups"), [older]), tmp_path / "older.pth")
    training = new_training(state["settings"])
    training.resume(tmp_path / "older.pth", tmp_path / "best.pth")
    assert training.optimizer.param_groups[0]["decoupled_weight_decay"] is False


def test_the_random_state_of_the_device_is_saved_and_restored(state, tmp_path):
    """Simulated: another device than the CPU, whose generator has this state."""
    training = new_training(state["settings"])
    given = []
    random = SimpleNamespace(get_rng_state=lambda: torch.arange(5).byte(), set_rng_state=given.append)
    training.device_module = random
    save(training.state_dict() | {"history": state["history"], "best": state["best"]}, tmp_path / "state.pth")
    training.resume(tmp_path / "state.pth", tmp_path / "best.pth")
    assert [list(value) for value in given] == [[0, 1, 2, 3, 4]]


def test_the_class_is_found_by_the_weights_and_must_be_chosen_if_several_fit(tmp_path, monkeypatch):
    for model in models.MODELS.values():
        torch.save(model().state_dict(), tmp_path / "one.pth")
        assert type(checkpoint.load(str(tmp_path / "one.pth"))) is model
    with pytest.raises(CheckpointError, match="does not contain the weights of Model_2"):
        checkpoint.load(tmp_path / "one.pth", "Model_2")

    class Model_4(models.Model_3):
        """The same layers, except for an activation."""

        def __init__(self):
            super().__init__()
            self[3] = torch.nn.GELU()

    monkeypatch.setitem(models.MODELS, "Model_4", Model_4)
    torch.save(Model_4().state_dict(), tmp_path / "four.pth")
    with pytest.raises(CheckpointError, match="fits Model_3 and Model_4: choose one with --model"):
        checkpoint.load(tmp_path / "four.pth")
    assert type(checkpoint.load(tmp_path / "four.pth", "Model_4")) is Model_4


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", [(), ("state",), ("state", "optimizer", "state")], ids=str)
def test_no_code_in_a_file_is_run(file, state, tmp_path, where, zipped):
    bad = put(file, where, Malicious(tmp_path / "run"))
    torch.save(bad, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    assert refusal(tmp_path / "bad.pth", state)
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "run").exists()  # so the file does carry code


def test_a_zip_bomb_is_rejected(state, tmp_path):
    """A file that PyTorch itself would load: one of its own, compressed."""
    torch.save({"zeros": torch.zeros(10_000_000)}, tmp_path / "large.pth")
    bomb = zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "large.pth") as large, bomb:
        for record in large.infolist():
            bomb.writestr(record.filename, large.read(record))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    assert len(torch.load(tmp_path / "bomb.pth", weights_only=True)["zeros"]) == 10_000_000
    path = tmp_path / "bomb.pth"
    assert refusal(path, state) == f"{path} is corrupt or not a checkpoint"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_directories_pipes_and_missing_files_are_rejected(state, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path, tmp_path / "pipe", tmp_path / "nowhere.pth":
        assert refusal(path, state)


@pytest.mark.parametrize(
    "version", [*VALUES, torch.zeros(3, 4), "a\nb", 2, 3, VERSION - 1, VERSION + 1], ids=repr
)
def test_a_state_of_another_version_is_rejected(file, state, tmp_path, version):
    path = tmp_path / "other.pth"
    torch.save(file | {"version": version}, path)
    assert refusal(path, state) == f"{path} is not a training state of this version (format {VERSION})"


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("model", "Model_1", "--model Model_3, not --model Model_1"),
        ("seed", 7, "--seed 0, not --seed 7"),
        ("batch_size", 64, "--batch-size 128, not --batch-size 64"),
        ("lr", 0.5, "--lr 0.01, not --lr 0.5"),
        ("augment", False, "--augment, not --no-augment"),
    ],
)
def test_a_flag_that_differs_is_named_as_one_types_it(state, state_file, flag, value, words):
    assert f"was saved with {words}: use its" in refusal(state_file, state, state["settings"] | {flag: value})


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_running_out_of_memory_is_not_reported_as_a_corrupt_file(state_file, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        checkpoint.read(state_file)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, function):
    path = tmp_path / "best.pth"
    files.write_atomically(path, b"old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if function == "replace":
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(RunError, match=r"best\.pth could not be written \(No space left on device\)"):
            files.write_atomically(path, b"new")
    else:  # some network file systems do not support it
        monkeypatch.setattr(os, "fsync", fail)
        files.write_atomically(path, b"new")
    content = b"old" if function == "replace" else b"new"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("best.pth", content)]


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Else it may be empty after a power loss."""
    order, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda *paths: order.append("replace") or replace(*paths))
    files.write_atomically(tmp_path / "best.pth", b"new")
    assert order == [len(b"new"), "replace"]
    attempts = 20 if os.name == "nt" else 1
    assert attempts == files.ATTEMPTS


@pytest.mark.parametrize("denials, succeeds", [(3, True), (5, False)])
def test_on_windows_a_file_that_another_process_has_open_is_replaced_when_it_is_free(
    tmp_path, monkeypatch, denials, succeeds
):
    """Simulated: five attempts, of which these are denied."""
    attempts, replace, slept = [], Path.replace, []

    def deny(source, target):
        attempts.append(target)
        if len(attempts) <= denials:
            raise PermissionError(errno.EACCES, "Access is denied")
        return replace(source, target)

    files.write_atomically(tmp_path / "last.pth", b"old")
    monkeypatch.setattr(files, "ATTEMPTS", 5)
    monkeypatch.setattr(Path, "replace", deny)
    monkeypatch.setattr(time, "sleep", slept.append)
    if succeeds:
        files.write_atomically(tmp_path / "last.pth", b"new")
    else:
        with pytest.raises(RunError, match=r"last\.pth could not be written \(Access is denied\)"):
            files.write_atomically(tmp_path / "last.pth", b"new")
    assert len(slept) == min(denials, 4)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new" if succeeds else b"old"]


@pytest.mark.parametrize(
    "accuracies, best",
    [([0.99, 0.995, 0.9941], 3), ([0.99, 0.995, 0.9939], 2), ([0.995, 0.9945, 0.9958], 3), ([0.9, 0.9], 2)],
)
def test_the_latest_epoch_within_a_tenth_of_a_point_of_the_highest_is_kept(accuracies, best):
    history = [{"validation_accuracy": accuracy} for accuracy in accuracies]
    assert checkpoint.epoch_to_keep(history) == best


def test_five_of_5000_images_are_a_tenth_of_a_point_and_six_are_more():
    labels = torch.zeros(5_000, dtype=torch.int64)
    accuracies = []
    for wrong in range(300):
        scores = torch.eye(10)[(torch.arange(5_000) < wrong).long()]
        accuracies.append({"validation_accuracy": accuracy(scores, labels)})
    for first in range(294):
        kept = [checkpoint.epoch_to_keep([accuracies[first], accuracies[first + n]]) for n in (5, 6)]
        assert kept == [2, 1]


def test_the_saved_weights_are_those_of_the_epoch_that_is_named(state):
    """Of accuracies within a tenth of a point, too."""
    training = new_training(state["settings"])
    for number, value in enumerate([0.99, 0.995, 0.9941, 0.9939], 1):
        training.average_model[1].weight.data.fill_(number)
        training.add_epoch({"validation_accuracy": value})
        kept = checkpoint.epoch_to_keep(training.history)
        assert training.best["1.weight"].unique().item() == kept == min(number, 3)


def test_old_files_are_kept_under_the_first_free_number(tmp_path, capsys):
    path = tmp_path / "best.pth"
    for content in b"0", b"1":
        path.write_bytes(content)
        checkpoint.back_up(path)
    checkpoint.back_up(path)  # nothing to rename
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert kept == {"best.1.pth": b"0", "best.2.pth": b"1"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"Renamed existing best.pth to best.{number}.pth" for number in (1, 2)]


def test_a_new_run_keeps_the_files_of_an_earlier_one(fit, tmp_path):
    fit("--epochs", 2)
    earlier = saved_states(tmp_path)
    output = fit("--epochs", 1, "--seed", 1).stdout
    for kind in "best", "last":
        line = f"Renamed existing {kind}_Model_3.pth to {kind}_Model_3.1.pth\n"
        assert output.count(line) == 1
        assert same(saved_states(tmp_path)[f"{kind}_Model_3.1.pth"], earlier[f"{kind}_Model_3.pth"])
    assert not same(saved_states(tmp_path)["best_Model_3.pth"], earlier["best_Model_3.pth"])


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_resumed_run_keeps_a_best_model_that_it_did_not_write(fit, tmp_path, epochs):
    """If the run continues and if it is finished, a file that was put there is kept under another name."""
    fit("--epochs", 2)
    ours = saved_states(tmp_path)
    theirs = {key: torch.ones_like(value) for key, value in ours["best_Model_3.pth"].items()}
    torch.save(theirs, tmp_path / "best_Model_3.pth")
    output = fit("--epochs", epochs, "--resume").stdout
    assert "Renamed existing best_Model_3.pth to best_Model_3.1.pth\n" in output
    assert same(saved_states(tmp_path)["best_Model_3.1.pth"], theirs)
    after = saved_states(tmp_path)
    assert same(after["best_Model_3.pth"], after["last_Model_3.pth"]["state"]["best"])
    fit("--epochs", epochs, "--resume")  # and nothing more is renamed
    assert same(saved_states(tmp_path), after)


def test_an_outdated_best_file_of_a_killed_run_is_replaced(fit, tmp_path):
    """A run that is killed between its two files leaves the best file of an earlier epoch, or none.

    The former is renamed, as is any file that is there.
    """
    fit("--epochs", 1)
    first = (tmp_path / "best_Model_3.pth").read_bytes()
    fit("--epochs", 2, "--resume")
    whole = saved_states(tmp_path)
    assert not same(*(whole["last_Model_3.pth"]["state"][key] for key in ("best", "model")))
    (tmp_path / "best_Model_3.pth").write_bytes(first)
    output = fit("--epochs", 2, "--resume").stdout
    assert "Renamed existing best_Model_3.pth to best_Model_3.1.pth\n" in output
    assert (tmp_path / "best_Model_3.1.pth").read_bytes() == first
    (tmp_path / "best_Model_3.1.pth").unlink()
    assert same(saved_states(tmp_path), whole)
    (tmp_path / "best_Model_3.pth").unlink()
    assert "Renamed" not in fit("--epochs", 2, "--resume").stdout
    assert same(saved_states(tmp_path), whole)


def test_resuming_without_a_file_starts_and_resuming_a_finished_run_only_tests(fit):
    first, second = (fit("--epochs", 1, "--resume").stdout for _ in range(2))
    assert "last_Model_3.pth: no such file, starting from the beginning\n" in first
    assert "\nResuming from last_Model_3.pth (epoch 1)\n" in second
    assert BLOCK.findall(second) == []
    assert TEST_LINE.search(first)[1] == TEST_LINE.search(second)[1]


def test_a_contradicting_flag_is_a_one_line_error_and_changes_nothing(fit, tmp_path):
    fit("--epochs", 1)
    before = saved_states(tmp_path)
    process = fit("--epochs", 2, "--resume", "--seed", 3, check=False)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "last_Model_3.pth was saved with --seed 0, not --seed 3: " in process.stderr
    assert same(saved_states(tmp_path), before)


def test_temporary_files_of_a_killed_run_are_removed_and_nothing_else(fit, tmp_path):
    mine = ["notes.tmp", ".best_Model_1.pth.tmp", ".best_Model_3.pth.tmp~", "best_Model_3.pth.tmp"]
    for name in [*mine, ".best_Model_3.pth.tmp", ".last_Model_3.pth.tmp"]:
        (tmp_path / name).write_text("half a file")
    fit("--epochs", 1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*mine, "best_Model_3.pth", "last_Model_3.pth"}


@pytest.mark.parametrize("epochs_before, writes, file", [(0, 0, "last"), (0, 1, "best"), (1, 0, "last")])
def test_a_full_disk_is_a_one_line_error_at_every_write(
    fit, tmp_path, monkeypatch, epochs_before, writes, file
):
    if epochs_before:
        fit("--epochs", epochs_before)
    before = saved_states(tmp_path)
    calls, replace = [], Path.replace

    def full(source, target):
        calls.append(source)
        if len(calls) > writes:
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", full)
    process = fit("--epochs", 3, "--resume", check=False)
    assert process.returncode == 1
    sentence = f"train.py: error: {file}_Model_3.pth could not be written (No space left on device)"
    saved = " (epoch 1 is saved in last_Model_3.pth)" if epochs_before or writes else ""
    assert process.stderr == f"{sentence}{saved}\n"
    after = saved_states(tmp_path)
    assert after.keys() == before.keys() | ({"last_Model_3.pth"} if writes else set())
    assert same({name: after[name] for name in before}, before)


def survive(start, folder, kills, *arguments, **options):
    """Kills runs and resumes them, that many times; the result must equal that of an uninterrupted run.

    Every other kill comes within milliseconds after something in the folder changed.
    """
    process = start(*arguments, "--output-dir", folder / "whole", **options)
    output, errors = end(process)
    assert process.returncode == 0, errors
    blocks, last_line = BLOCK.findall(output), TEST_LINE.search(output)[0].splitlines()[0]
    expected = saved_states(folder / "whole")

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
                    time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.005 if aimed else 1))
            process.kill()
            output += end(process)[0]
            states = saved_states(output_dir)
            if process.returncode == 0:
                break
            killed += 1
        finished += 1
        # A best file of an earlier epoch, of a run killed between its two writes, is renamed.
        states = {name: state for name, state in states.items() if name.count(".") == 1}
        assert same(states, expected)
        # An epoch is saved before it is printed, so the file is right even if the output is lost.
        assert set(BLOCK.findall(output)) <= set(blocks)
        assert last_line in output


def test_a_killed_run_resumes_to_the_same_bits(start, tmp_path):
    survive(start, tmp_path, 2, "--epochs", 4)


@pytest.mark.slow
def test_fifty_killed_runs_resume_to_the_same_bits(start, tmp_path):
    survive(start, tmp_path, 50, "--epochs", 8)


@pytest.mark.slow
def test_killed_runs_on_all_of_mnist_resume_to_the_same_bits(start, tmp_path):
    survive(start, tmp_path, 5, "--model", "Model_2", "--epochs", 3, data_dir=ROOT / "data")
