"""Files and directories: the ones that the command line names, atomic writes, and a lock."""

import contextlib
import glob
import os
import time
from pathlib import Path

from support.process import RunError, warn

try:
    import fcntl
except ImportError:  # Windows, where two runs in one directory are not detected
    fcntl = None

# On Windows, a file that a virus scanner, a cloud drive or an editor has open cannot be replaced.
ATTEMPTS = 20 if os.name == "nt" else 1  # 0.1 s apart
SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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


def find_images(paths):
    """Returns the paths of images, and the paths of other files in the directories.

    Directories are replaced by the image files in them and in their subdirectories, by extension; hidden
    files are excluded. Raises OSError if a directory cannot be read.
    """
    images, others = [], []
    for path in expand(paths):
        if not path.is_dir():
            images.append(path)
            continue
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        for file in files:
            if "/." not in f"/{file.relative_to(path).as_posix()}":
                (images if file.suffix.lower() in SUFFIXES else others).append(file)
    return images, others


def write(content, path):
    """Writes bytes to a file atomically: if it is interrupted, `path` is either the old file or the new one.

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
    """Creates a directory if needed. Raises RunError or OSError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():  # NUL, for one, on Windows
            raise FileExistsError
    except FileExistsError as error:
        kind = "a link to a directory that does not exist" if folder.is_symlink() else "not a directory"
        raise RunError(f"{folder} is {kind}") from error


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
