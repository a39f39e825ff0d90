"""Files and directories: patterns of paths, atomic writes, and a lock."""

import contextlib
import glob
import os
import tempfile
import time
from pathlib import Path

from support.exits import RunError, warn

try:
    import fcntl
except ImportError:  # Windows, where two runs in one directory are not detected
    fcntl = None

# On Windows, a file that a virus scanner, a cloud drive or an editor has open cannot be replaced.
ATTEMPTS = 20 if os.name == "nt" else 1  # 0.1 s apart


def expand(paths):
    """Returns the paths, with patterns that the shell left unexpanded replaced by their matches.

    Raises FileNotFoundError if a pattern matches nothing.
    """
    expanded = []
    for path in paths:
        is_pattern = glob.has_magic(str(path)) and not path.exists()
        matches = sorted(glob.glob(str(path))) if is_pattern else [path]  # noqa: PTH207  # absolute ones too
        if not matches:
            raise FileNotFoundError(2, "No file matches this pattern", str(path))
        expanded += map(Path, matches)
    return expanded


def write_atomically(path, content):
    """Writes bytes to a file atomically: if it is interrupted, `path` is either the old file or the new one.

    A link is replaced by a file.

    Raises:
        RunError: the file cannot be written; the message names it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            with contextlib.suppress(OSError):  # not supported by some network file systems
                os.fsync(file.fileno())
        for remaining in reversed(range(ATTEMPTS)):
            try:
                temporary.replace(path)
                break
            except PermissionError:
                if not remaining:
                    raise
                time.sleep(0.1)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def create_directory(folder):
    """Creates a directory if needed. Raises RunError if that fails or no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        kind = "a link to a directory that does not exist" if folder.is_symlink() else "not a directory"
        raise RunError(f"{folder} is {kind}") from error
    except OSError as error:
        raise RunError(f"no file can be written to {folder} ({error.strerror})") from error


@contextlib.contextmanager
def locked(folder):
    """Holds an exclusive lock on a directory until the block ends. Raises RunError if another run holds it.

    No lock is taken if the platform or the file system does not support it.
    """
    with contextlib.ExitStack() as stack:
        if fcntl:
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                advice = "wait for it, or choose another --output-dir"
                raise RunError(f"another run is writing to {folder.resolve()}: {advice}") from error
            except OSError as error:
                warn(f"Cannot lock {folder} ({error.strerror}): make sure that no other run writes there")
        yield
