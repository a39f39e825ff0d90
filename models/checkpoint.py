"""Files of weights and of training states: written whole or not at all, read without running code."""

import copy
import io
import itertools
import os
import random
import zipfile

import torch

import models

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs out of one folder
    fcntl = None

LAYOUT = 2  # of a training state; to be raised when it changes


def temporary_name(path):
    """Where `save` writes before it moves the file to `path`; left over only by a run that was killed."""
    return path.with_name(f".{path.name}.tmp")


def save(state, path, keep=None):
    """Writes what `torch.load` reads back; whatever stops it, `path` is the old file or the new one.

    A file that stands at `keep` is renamed just before, and a line says so.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep and keep.exists():
            names = (keep.with_name(f"{keep.stem}.{number}{keep.suffix}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            keep.rename(kept)
            print(f"{keep.name} of an earlier run is now {kept.name}")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.strerror})") from error


def read(path):
    """Returns what `save` wrote, its tensors on the CPU; runs no code that a file might carry.

    Raises:
        ValueError: the file is damaged, or holds more than tensors, numbers, texts and containers of these.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise OSError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch itself neither compresses nor compares checksums.
            if any(record.compress_type for record in archive.infolist()) or archive.testzip():
                raise ValueError("damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # there is no end to what a damaged file can raise
        raise ValueError(f"{path} is damaged, or is no checkpoint of tensors and numbers alone") from error


def load(path):
    """Returns the model, in evaluation mode, whose weights are in the file; names and shapes tell which.

    Raises:
        ValueError: the file is damaged, or holds the weights of none of the models.
        OSError: the file cannot be read.
    """

    def shapes(state):
        return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}

    state = read(path)
    if isinstance(state, dict) and "layout" in state:
        raise ValueError(f"{path} is the state of a training run: its best model is in the file best_...")
    for name in models.__all__:
        model = getattr(models, name)()
        if isinstance(state, dict) and shapes(state) == shapes(model.state_dict()):
            check(state, model.state_dict(), f"{path}:")
            model.load_state_dict(state)
            return model.eval()
    raise ValueError(f"{path} does not have the weights of {', '.join(models.__all__)}")


def check(found, expected, where):
    """Raises ValueError, naming the first difference, unless `found` could stand in the place of `expected`.

    Containers must have the same keys and lengths, tensors the same shapes and dtypes and finite
    values; of the rest, numbers may differ in value. `where` begins the message.
    """

    def fail(problem):
        raise ValueError(f"{where} {problem}")

    kind = next(kind for kind in (torch.Tensor, dict, type(expected)) if isinstance(expected, kind))
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        fail(f"is of the type {type(found).__name__} instead of {kind.__name__}")
    if kind is torch.Tensor:
        if found.shape != expected.shape:
            fail(f"has the shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        if found.dtype != expected.dtype or found.layout != expected.layout:
            fail(f"is {found.dtype}, {found.layout} instead of {expected.dtype}, {expected.layout}")
        if not found.isfinite().all():
            fail("has values that are not finite")
    elif kind is dict:
        for key in expected:
            if key not in found:
                fail(f"has no {key!r}")
        for key in found:
            if key not in expected:
                fail(f"has a {key!r} too many")
            check(found[key], expected[key], f"{where} {key!r}")
    elif kind in (list, tuple):
        if len(found) != len(expected):
            fail(f"has {len(found)} elements instead of {len(expected)}")
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            check(one, other, f"{where} [{index}]")
    elif kind not in (int, float) and found != expected:
        fail(f"is {found!r} instead of {expected!r}")


def read_state(path, expected):
    """Returns what an interrupted run saved; ValueError where it is not built like `expected`."""
    saved = read(path)
    if not isinstance(saved, dict) or "layout" not in saved:
        raise ValueError(f"{path} is no training state")
    if type(saved["layout"]) is not int or saved["layout"] != LAYOUT:  # it might be a tensor
        raise ValueError(f"{path} has layout {saved['layout']!r:.20}, this version reads layout {LAYOUT}")
    flags = saved.get("flags")
    for flag, value in expected["flags"].items():
        if isinstance(flags, dict) and type(flags.get(flag)) is type(value) and flags[flag] != value:
            raise ValueError(
                f"{path} is of a run with --{flag} {repr(flags[flag]).strip(chr(39))}, not {value}: "
                "resume it with its own flags, or choose another --output-dir"
            )
    history = saved.get("history")
    if not isinstance(history, list) or not history:
        raise ValueError(f"{path}: 'history' has no epoch")
    check(saved, expected | {"history": [(0.0,) * 5] * len(history)}, f"{path}:")
    return saved


def state_after_a_step(optimizer):
    """Returns the `state_dict` of a copy of the optimiser that has taken its first step."""
    optimizer = copy.deepcopy(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def random_states(generator, device):
    """Returns the states of all sources of random numbers, `generator` being the training loader's."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(16).byte(),
        "loader": generator.get_state(),
    }


def restore(saved, parts, generator, device, path):
    """Puts a training state that `read_state` returned into its parts and into the sources of random numbers.

    Raises ValueError where a number in it is out of its range.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        random.setstate(saved["random"]["python"])
        torch.set_rng_state(saved["random"]["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["random"]["cuda"], device)
        generator.set_state(saved["random"]["loader"])
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a value that no run leaves ({str(error).splitlines()[0]})") from error


def lock(folder):
    """Makes this process the only run that writes to the folder, until it ends, however it ends."""
    if fcntl:
        try:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another run is writing to {folder.resolve()}: wait for it, or choose another --output-dir"
            ) from error
