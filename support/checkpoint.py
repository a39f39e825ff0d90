"""Files of weights and of training states: written atomically, read without running code."""

import copy
import hashlib
import io
import itertools
import os
import zipfile

import torch

import models

FORMAT_VERSION = 5  # of a training state; to be raised when what it holds, or how it goes on, changes
NOT_DAMAGE = OSError, MemoryError, torch.OutOfMemoryError  # what reading a good file can raise


class CheckpointError(ValueError):
    """A file cannot be written, or is not the checkpoint that it should be."""


def serialize(state):
    """Returns the bytes of the file that `torch.save` makes of this."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def digest(content):
    """Returns an int by which these bytes are known again: the first 64 bits of their SHA-256 sum."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def temporary_path(path):
    """Where `write` writes before it moves the file to `path`; left over only by a run that was killed."""
    return path.with_name(f".{path.name}.tmp")


def set_aside(path):
    """Renames a file that this run did not write, if there is one, to the next free name, and says so."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        free = next(name for name in names if not name.exists())
        path.rename(free)
        print(f"{path.name} is not of this run: it is now {free.name}")


def make_way(*paths):
    """Removes what a killed run has left half-written; CheckpointError where there is a folder at a path."""
    for path in paths:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: move it away, this run saves a file there")
        temporary_path(path).unlink(missing_ok=True)


def write(content, path, own=None):
    """Writes bytes to a file atomically: whatever stops it, `path` is the old file or the new one.

    With `own`, digests, another old file than these is set aside and not replaced.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = temporary_path(path)
    try:
        old = digest(path.read_bytes()) if path.exists() else None
        if old == digest(content):
            return
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if own is not None and old not in own:
            set_aside(path)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path):
    """Returns what `torch.save` wrote, its tensors on the CPU; runs no code that a file might carry.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds more than tensors, numbers, texts
            and containers of these.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch itself neither compresses nor compares checksums.
            if any(record.compress_type for record in archive.infolist()) or archive.testzip():
                raise ValueError("damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except NOT_DAMAGE:
        raise
    except Exception as error:  # there is no end to what a damaged file can raise
        raise CheckpointError(
            f"{path} is damaged, or is no checkpoint of tensors and numbers alone"
        ) from error


def form(value):
    """Returns what training leaves as it is in a state: types, keys, lengths, shapes, dtypes and texts."""
    if isinstance(value, torch.Tensor):
        # A random state, the only uint8, has a size of its own on each kind of device; loading checks it.
        shape = None if value.dtype == torch.uint8 else value.shape
        return torch.Tensor, value.dtype, value.layout, shape
    if isinstance(value, dict):
        return {key: form(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [form(element) for element in value]
    return value if isinstance(value, str | bool) else type(value)


def find_not_finite(state, name=""):
    """Returns the name of the first tensor in nested dicts that has values that are not finite, or None."""
    if isinstance(state, dict):
        found = (find_not_finite(value, str(key)) for key, value in state.items())
        return next(filter(None, found), None)
    if isinstance(state, torch.Tensor) and (state.is_meta or not state.cpu().isfinite().all()):
        return name
    return None


def check(state, expected, path):
    """Raises CheckpointError unless `state` has the form of `expected` and finite values alone."""
    if form(state) != form(expected):
        raise CheckpointError(f"{path} is not built like what this version of the project saves there")
    if name := find_not_finite(state):
        raise CheckpointError(f"{path}: {name!r} has values that are not finite")


def model_classes():
    """Returns the classes in `models` by their names."""
    return {name: kind for name, kind in vars(models).items() if isinstance(kind, type)}


def load(path, model_name=None):
    """Returns the model, in evaluation mode, whose weights are in the file.

    Args:
        path: of a `state_dict`.
        model_name: the model's class in `models`; by default the one whose names and shapes fit.

    Raises:
        CheckpointError: the file is damaged, or the weights fit no model or, without a name, several.
        OSError: the file cannot be read.
    """
    state = read(path)
    if isinstance(state, dict) and {"version", "layout"} & state.keys():  # "layout": up to format 2
        raise CheckpointError(
            f"{path} is the state of a training run: its best model is in the file best_..."
        )
    classes = model_classes()
    asked = [model_name] if model_name else list(classes)
    fitting = [model for name in asked if form((model := classes[name]()).state_dict()) == form(state)]
    if not fitting:
        raise CheckpointError(f"{path} does not have the weights of {' or '.join(asked)}")
    if len(fitting) > 1:
        names = " and of ".join(type(model).__name__ for model in fitting)
        raise CheckpointError(f"{path} could be of {names}: say which with --model")
    (model,) = fitting
    check(state, model.state_dict(), path)
    model.load_state_dict(state)
    return model.eval()


class TrainingState:
    """All that the next epoch of a run depends on, with PyTorch's `state_dict` and `load_state_dict`.

    Args:
        model, optimizer, scheduler: PyTorch's, no step taken yet.
        generator: that of the training loader.
        settings: the flags that must be the same when the run is resumed, a dict of their values.

    Attributes:
        average: a copy of the model, for the average of its weights.
        history: an epoch's figures, a dict an epoch.
        best: the average's weights after the best epoch, a `state_dict` on the CPU.
        saved: a sentence that says which epoch is saved where; empty before the first.
    """

    PARTS = "model", "average", "optimizer", "scheduler"
    COLUMNS = "lr", "training_loss", "training_accuracy", "validation_loss", "validation_accuracy"

    def __init__(self, model, optimizer, scheduler, generator, settings):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.average = copy.deepcopy(model)
        self.generator, self.settings = generator, settings
        self.history, self.best, self.saved = [], {}, ""
        self.best_digests = [0, 0]  # of the last two files of best weights that this run has written
        self.device_random = getattr(torch, next(model.parameters()).device.type, None)  # torch.cuda, ...

    def best_epoch(self):
        """Returns the epoch, from 1, with the highest validation accuracy: the last of equals."""
        accuracies = [epoch["validation_accuracy"] for epoch in self.history]
        return len(accuracies) - accuracies[::-1].index(max(accuracies))

    def is_finished(self, epochs, patience=None):
        """Whether so many epochs are done, or as many as the patience in a row were no better."""
        accuracies = [epoch["validation_accuracy"] for epoch in self.history]
        stale = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
        return len(self.history) >= epochs or (patience is not None and stale >= patience)

    def add_epoch(self, *figures):
        """Notes an epoch's figures, those of `COLUMNS`; where it is the best, its average is the best."""
        self.history.append(dict(zip(self.COLUMNS, figures, strict=True)))
        if self.best_epoch() == len(self.history):
            self.best = {key: value.cpu().clone() for key, value in self.average.state_dict().items()}

    def state_dict(self):
        random = {"cpu": torch.get_rng_state(), "loader": self.generator.get_state()}
        random["device"] = torch.zeros(0, dtype=torch.uint8)
        if hasattr(self.device_random, "get_rng_state"):
            random["device"] = self.device_random.get_rng_state()
        state = {"version": FORMAT_VERSION, "settings": self.settings, "history": self.history}
        state |= {"best": self.best, "best_digests": self.best_digests, "random": random}
        return state | {part: getattr(self, part).state_dict() for part in self.PARTS}

    def load_state_dict(self, state):
        for part in self.PARTS:
            getattr(self, part).load_state_dict(state[part])
        self.history, self.best, self.best_digests = state["history"], state["best"], state["best_digests"]
        torch.set_rng_state(state["random"]["cpu"])
        self.generator.set_state(state["random"]["loader"])
        if hasattr(self.device_random, "set_rng_state") and len(state["random"]["device"]):
            self.device_random.set_rng_state(state["random"]["device"])

    def example(self, epochs):
        """Returns a `state_dict` of the form that it has after so many epochs.

        Takes an optimiser's step, of no length, after which the optimiser has all its state.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        history = [dict.fromkeys(self.COLUMNS, 0.0)] * epochs
        return self.state_dict() | {"history": history, "best": self.model.state_dict()}

    def save(self, last_path, best_path):
        """Writes the state, then the best weights; no file that this run did not write is lost.

        A run that is killed in between leaves an older best file, which `resume` puts right.
        """
        weights = serialize(self.best)
        if digest(weights) != self.best_digests[1]:
            self.best_digests = [self.best_digests[1], digest(weights)]
        write(serialize(self.state_dict()), last_path)
        write(weights, best_path, own=self.best_digests)
        self.saved = f"epoch {len(self.history)} is saved in {last_path}"

    def resume(self, last_path, best_path):
        """Goes on from the state that is saved at `last_path`.

        Raises:
            CheckpointError: the file is damaged, or is of another version or of a run with other flags.
            OSError: the file cannot be read.
        """
        saved = read(last_path)
        version = saved.get("version") if isinstance(saved, dict) else None
        if type(version) is not int or version != FORMAT_VERSION:  # it might be a tensor
            raise CheckpointError(
                f"{last_path} is no training state of this version, format {FORMAT_VERSION}"
            )
        settings = saved.get("settings")
        for flag, value in self.settings.items():
            found = settings.get(flag) if isinstance(settings, dict) else None
            if type(found) is type(value) and found != value:
                shown = f"--{flag.replace('_', '-')} {repr(found).strip(chr(39))}"  # always on one line
                raise CheckpointError(
                    f"{last_path} is of a run with {shown}, not {value}: "
                    "resume it with its own flags, or choose another --output-dir"
                )
        history = saved.get("history")
        check(saved, self.example(max(1, len(history)) if isinstance(history, list) else 1), last_path)
        try:
            self.load_state_dict(saved)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{last_path} has a value that no run leaves ({reason})") from error
        self.save(last_path, best_path)
