"""Files of weights and of training states: what is whole comes back bit for bit, the rest is refused."""

import copy
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import models
from conftest import ROOT
from models import checkpoint

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
    command = [sys.executable, ROOT / "tests/train_small.py", "--data-dir", small_data, "--epochs", "1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "last_Model_3.pth"


@pytest.fixture(scope="module")
def state(state_file):
    return torch.load(state_file, weights_only=True)


def same(one, other):
    """Whether two nested containers are equal, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def refusal(path, expected):
    """The one sentence with which the file is refused; where it is not, it must be what is expected."""
    try:
        assert same(checkpoint.read_state(path, expected), expected)
    except (ValueError, OSError) as error:
        sentence = str(error)
        assert str(path) in sentence and "\n" not in sentence
        return sentence
    return None


def places(state, where=()):
    """The paths to everything in nested containers, themselves included."""
    yield where
    for key in state if isinstance(state, dict) else range(len(state)) if isinstance(state, list) else ():
        yield from places(state[key], (*where, key))


def put(state, where, value):
    """A copy of nested containers with another value in this place."""
    if not where:
        return value
    state = copy.copy(state)
    state[where[0]] = put(state[where[0]], where[1:], value)
    return state


def test_a_state_comes_back_bit_for_bit(state, tmp_path):
    checkpoint.save(state, tmp_path / "again.pth")
    assert refusal(tmp_path / "again.pth", state) is None


@many
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(state_file, state, tmp_path, data):
    content = bytearray(state_file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped.pth").write_bytes(content)
    refusal(tmp_path / "flipped.pth", state)


@many
@given(data=st.data())
def test_a_truncated_file_is_refused(state_file, state, tmp_path, data):
    content = state_file.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert refusal(tmp_path / "cut.pth", state)


@many
@given(content=st.binary(max_size=300))
@example(b"PK\x03\x04")
@example(b"PK\x05\x06" + bytes(18))
@example(b"\x80\x02cposix\nsystem\nX\x06\x00\x00\x00exit 1\x85R.")
def test_any_bytes_are_refused(state, tmp_path, content):
    (tmp_path / "bytes.pth").write_bytes(content)
    assert refusal(tmp_path / "bytes.pth", state)


VALUES = [None, True, -1, 2**70, 0.5, "text", [], {}, (), torch.zeros(3), torch.zeros(3, dtype=torch.int64)]


@many
@given(data=st.data())
def test_a_state_with_something_else_in_one_place_is_refused(state, tmp_path, data):
    where = data.draw(st.sampled_from(list(places(state))))
    value = data.draw(st.sampled_from(VALUES))
    other = put(state, where, value)
    torch.save(other, tmp_path / "other.pth")
    try:
        checkpoint.read_state(tmp_path / "other.pth", state)
    except ValueError as error:
        assert str(error).startswith(str(tmp_path / "other.pth")) and "\n" not in str(error)
    else:  # only a number may be another number; None in the place of None changes nothing
        assert isinstance(value, bool | int | float) or same(other, state)


@many
@given(data=st.data())
def test_tensors_of_another_shape_or_dtype_or_not_finite_are_refused(state, tmp_path, data):
    tensors = {key: tensor for key, tensor in state["best"].items() if tensor.is_floating_point()}
    key = data.draw(st.sampled_from(list(tensors)))
    nan, infinite = tensors[key].clone(), tensors[key].clone()
    nan.view(-1)[-1], infinite.view(-1)[0] = float("nan"), float("-inf")
    wrong = [
        nan,
        infinite,
        tensors[key].double(),
        tensors[key].to_sparse(),
        tensors[key][None],
        tensors[key][:-1],
    ]
    weights = state["best"] | {key: data.draw(st.sampled_from(wrong))}
    checkpoint.save(weights, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=f"^weights '{key}' "):
        checkpoint.check(checkpoint.read(tmp_path / "wrong.pth"), state["best"], "weights")


def test_another_models_weights_are_refused(tmp_path):
    checkpoint.save(models.Model_1().state_dict(), tmp_path / "one.pth")
    with pytest.raises(ValueError, match="has no '1.weight'"):
        checkpoint.check(checkpoint.read(tmp_path / "one.pth"), models.Model_2().state_dict(), "one.pth")


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", [(), ("best",), ("optimizer", "state"), ("flags", "seed")], ids=str)
def test_no_code_is_run(state, tmp_path, where, zipped):
    bad = put(state, where, Malicious(tmp_path / "run"))
    torch.save(bad, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    assert refusal(tmp_path / "bad.pth", state)
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "run").exists()  # it would have been


def test_a_zip_bomb_is_refused(state, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    assert refusal(tmp_path / "bomb.pth", state)


def test_folders_pipes_and_missing_files_are_refused(state, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path, tmp_path / "pipe", tmp_path / "nowhere.pth":
        assert refusal(path, state)


def test_another_layout_is_refused_by_its_number(state, tmp_path):
    for layout in checkpoint.LAYOUT - 1, checkpoint.LAYOUT + 1:
        checkpoint.save(state | {"layout": layout}, tmp_path / "other.pth")
        assert f"layout {layout}" in refusal(tmp_path / "other.pth", state)


@pytest.mark.parametrize("layout", [*VALUES, torch.zeros(3, 4), "a\nb"], ids=repr)
def test_a_layout_that_is_no_number_is_refused(state, tmp_path, layout):
    checkpoint.save(state | {"layout": layout}, tmp_path / "other.pth")
    assert refusal(tmp_path / "other.pth", state)


@pytest.mark.parametrize("part, key", [("best", "a\nb"), ("flags", "a\nb"), ("flags", "model")])
def test_names_from_the_file_do_not_break_the_line(state, tmp_path, part, key):
    checkpoint.save(state | {part: state[part] | {key: "a\nb"}}, tmp_path / "other.pth")
    assert refusal(tmp_path / "other.pth", state)


@pytest.mark.parametrize("flag, value", [("model", "Model_1"), ("seed", 7), ("batch-size", 64), ("lr", 0.5)])
def test_a_flag_that_contradicts_is_named_with_both_values(state, state_file, flag, value):
    sentence = refusal(state_file, state | {"flags": state["flags"] | {flag: value}})
    assert f"--{flag} {state['flags'][flag]}, not {value}" in sentence


def test_a_failed_save_leaves_the_old_file_and_nothing_else(state, tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    checkpoint.save({"a": torch.ones(1)}, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"best\.pth could not be written \(No space left on device\)"):
        checkpoint.save(state, path, keep=path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("best.pth", before)]


def test_old_files_are_kept_under_the_first_free_number(tmp_path, capsys):
    for number in range(3):
        checkpoint.save({"number": number}, tmp_path / "best.pth", keep=tmp_path / "best.pth")
    kept = {path.name: checkpoint.read(path)["number"] for path in tmp_path.iterdir()}
    assert kept == {"best.1.pth": 0, "best.2.pth": 1, "best.pth": 2}
    assert capsys.readouterr().out.splitlines()[1] == "best.pth of an earlier run is now best.2.pth"
