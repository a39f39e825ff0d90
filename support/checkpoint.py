"""Saving and loading of model weights and training state."""

import contextlib
import copy
import io
import itertools
import zipfile
from pathlib import Path

import torch

from models import MODELS
from support.exits import RunError
from support.files import write_atomically
from support.flags import format_flag

TOLERANCE = 0.001  # the standard error of an accuracy of 99.5% over 5,000 images
VERSION = 9  # of the training state; increment it when the contents or their meaning change


class CheckpointError(RunError):
    """A file is not a valid checkpoint."""


def back_up(*paths):
    """Renames existing files to the next free `<stem>.<n><suffix>`, and prints the new names."""
    for path in filter(Path.exists, paths):
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        free = next(name for name in names if not name.exists())
        path.rename(free)
        print(f"Renamed existing {path.name} to {free.name}")


def serialize(state):
    """Returns the bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read(path):
    """Returns an object saved by `torch.save`, with its tensors on the CPU, without running code in the file.

    Raises:
        CheckpointError: the file does not exist, is corrupt, or contains objects other than tensors, numbers,
            strings and containers of these.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch writes uncompressed archives and does not verify their checksums.
            if any(record.compress_type for record in archive.infolist()) or archive.testzip():
                raise ValueError("corrupt")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a corrupt file can raise almost anything
        raise CheckpointError(f"{path} is corrupt or not a checkpoint") from error


def load(path, model_name=None):
    """Returns the model, in evaluation mode, whose weights are in a file.

    Args:
        path: file of a `state_dict`.
        model_name: a name in `MODELS`; by default the one whose parameters have these names and shapes.

    Raises:
        CheckpointError: the file is corrupt, or the weights fit no model or, without a name, several.
        OSError: the file cannot be read.
    """
    state = read(Path(path))
    if isinstance(state, dict) and "version" in state:
        raise CheckpointError(f"{path} is a training state; the weights are in the file best_...")
    names = [model_name] if model_name else MODELS
    fitting = []
    for name in names:
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):  # raised if the weights do not fit
            model = MODELS[name]()
            model.load_state_dict(state)
            fitting.append(model)
    if not fitting:
        raise CheckpointError(f"{path} does not contain the weights of {' or '.join(names)}")
    if len(fitting) > 1:
        found = " and ".join(type(model).__name__ for model in fitting)
        raise CheckpointError(f"{path} fits {found}: choose one with --model")
    for name, value in fitting[0].named_parameters():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite")
    return fitting[0].eval()


def epoch_to_keep(history):
    """Returns the epoch, from 1, whose weights are kept: the latest with about the highest accuracy.

    Differences up to `TOLERANCE` are noise, and weights that were trained for longer tend to be better.
    """
    accuracies = [epoch["validation_accuracy"] for epoch in history]
    return max(i for i, value in enumerate(accuracies, 1) if value >= max(accuracies) - TOLERANCE)


class TrainingState:
    """The complete state of a training run.

    Args:
        model, optimizer, scheduler: PyTorch objects, before the first step.
        generator: generator of the training loader.
        settings: {flag: value}; resuming requires the same values.

    Attributes:
        average_model: a copy of the model that holds the average of its weights.
        history: list of metrics, one dict per epoch.
        best: `state_dict` of the average after the epoch to keep, on the CPU.
        saved_epochs: number of epochs that were trained when the state was last saved or loaded.
    """

    PARTS = "model", "average_model", "optimizer", "scheduler"

    def __init__(self, model, optimizer, scheduler, generator, settings):
        self.model = model
        self.average_model = copy.deepcopy(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.generator = generator
        self.settings = settings
        self.history = []
        self.best = {}
        self.saved_epochs = 0
        self.device_module = getattr(torch, next(model.parameters()).device.type, None)  # torch.cuda, ...

    def is_finished(self, epochs, patience=None):
        """Returns True after `epochs` epochs, or after `patience` epochs without improvement."""
        accuracies = [epoch["validation_accuracy"] for epoch in self.history]
        stale = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
        return len(self.history) >= epochs or (patience is not None and stale >= patience)

    def add_epoch(self, metrics):
        """Appends the metrics of an epoch, a dict; keeps a copy of the average if it is the one to keep."""
        self.history.append(metrics)
        if epoch_to_keep(self.history) == len(self.history):
            self.best = {name: value.cpu().clone() for name, value in self.average_model.state_dict().items()}

    def state_dict(self):
        random = {"cpu": torch.get_rng_state(), "loader": self.generator.get_state()}
        if hasattr(self.device_module, "get_rng_state"):
            random["device"] = self.device_module.get_rng_state()
        state = {"settings": self.settings, "history": self.history, "random": random, "best": self.best}
        for part in self.PARTS:
            state[part] = getattr(self, part).state_dict()
        return state

    def load_state_dict(self, state):
        for part in self.PARTS:
            getattr(self, part).load_state_dict(state[part])
        self.history = state["history"]
        self.best = state["best"]
        torch.set_rng_state(state["random"]["cpu"])
        self.generator.set_state(state["random"]["loader"])
        if "device" in state["random"] and hasattr(self.device_module, "set_rng_state"):
            self.device_module.set_rng_state(state["random"]["device"])

    def save(self, last_path, best_path):
        """Writes the state, then the best weights if they are those of the last epoch.

        If the run is killed in between, the best file is out of date; `resume` writes it again.
        """
        file = {"version": VERSION, "pytorch": str(torch.__version__), "state": self.state_dict()}
        write_atomically(last_path, serialize(file))
        self.saved_epochs = len(self.history)
        if epoch_to_keep(self.history) == len(self.history):
            write_atomically(best_path, serialize(self.best))

    def resume(self, last_path, best_path):
        """Loads the state saved at `last_path`, and makes `best_path` the file of its best weights.

        A file at `best_path` with other weights is renamed.

        Raises:
            CheckpointError: the file is corrupt, or was saved by another version or with other settings.
            OSError: the file cannot be read.
        """
        file = read(last_path)
        version = file.get("version") if isinstance(file, dict) else None
        if not isinstance(version, int) or version != VERSION:
            raise CheckpointError(f"{last_path} is not a training state of this version (format {VERSION})")
        try:
            self.check_settings(file["state"]["settings"], last_path)
            self.load_state_dict(file["state"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"saved with PyTorch {file.get('pytorch')}, loaded with {torch.__version__}"
            raise CheckpointError(f"{last_path} cannot be loaded ({reason}): {str(error)[:80]!r}") from error
        best = serialize(self.best)
        if not best_path.exists() or best_path.read_bytes() != best:
            back_up(best_path)
            write_atomically(best_path, best)
        self.saved_epochs = len(self.history)

    def check_settings(self, settings, path):
        """Raises CheckpointError unless the settings in the file at `path` are those of this run."""
        for flag, value in self.settings.items():
            if settings[flag] != value:
                other = f"{format_flag(flag, settings[flag])}, not {format_flag(flag, value)}"
                if flag == "data_dir":  # its value is a digest
                    other = "other images in --data-dir"
                advice = "use its flags, or another --output-dir"
                raise CheckpointError(f"{path} was saved with {other}: {advice}")
