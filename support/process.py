"""What a run takes from its process, and gives back when it ends: signals, folders, streams, workers.

A notebook, a thread, a job in the background or a closed terminal may have its own idea of each of them.
"""

import contextlib
import datetime
import errno
import io
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch import distributed

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs out of one folder
    fcntl = None

NVIDIA = Path("/dev/nvidia0")

# Set by torchrun, where there are several workers. A variable that something else left behind means nothing.
LAUNCHED = distributed.is_available() and distributed.is_torchelastic_launched()
RANK, WORLD_SIZE, LOCAL_RANK = (
    int(os.environ[name]) if LAUNCHED else default
    for name, default in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)]
)


class Stopped(BaseException):
    """A signal has arrived that ends the run: no Exception, so that nothing on its way keeps it."""

    saved = "nothing of this run is saved yet"


class RunError(Exception):
    """A run cannot go on, through no fault of the program; the message says what to do."""


def is_terminal(stream):
    """Whether a standard stream is open, and is a terminal."""
    return stream is not None and stream.isatty()


def warn(text):
    """Prints a line on standard error, where that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def fail(text):
    """Ends the program with one sentence on standard error and status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {text}")


@contextlib.contextmanager
def sentences_for(*kinds):
    """Ends the program with one sentence at an error of these kinds, at a file, and at a lack of memory.

    Whatever else is raised is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except (RunError, *kinds) as error:
        fail(error)
    except OSError as error:
        if error.filename is None:  # not about a file that the user has named
            raise
        fail(error)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a type for a lack of a GPU's memory alone, but the CPU's allocator signs its message.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        fail("there is too little memory: try a smaller --batch-size, or another --device")


def can_write(stream):
    """Whether a stream takes another line."""
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def printed_lines():
    """Has each printed line reach its reader at once, with "?" for what the stream cannot encode.

    Where standard output is closed, or its reader goes away, RunError says so.
    """
    stream = sys.stdout
    if stream is None:
        raise RunError("standard output is closed: let it go to a terminal, a file or /dev/null")
    is_file = isinstance(stream, io.TextIOWrapper)  # a notebook's is none
    before = {"errors": stream.errors, "line_buffering": stream.line_buffering} if is_file else {}
    if is_file:
        stream.reconfigure(errors="replace", line_buffering=True)
    try:
        yield
        stream.flush()
    except OSError as error:
        if error.filename is not None or can_write(stream):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what Python flushes at its end
        raise RunError(f"standard output takes no more ({error.strerror})") from error
    finally:
        if is_file:
            stream.reconfigure(**before)


@contextlib.contextmanager
def stopped_by_signals():
    """Has Ctrl-C, `kill` and a lost terminal end the program, saying what is saved and how to go on.

    `Stopped` is raised wherever the program is: files are written atomically, so that no moment is a bad
    one. A signal that was ignored at the start stays ignored, as under nohup or in a script's background.
    In a thread that is not the main one, where Python allows no handler, nothing is changed.
    """
    inherited = {}

    def stop(number, frame):
        raise Stopped(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):  # Windows has no SIGHUP
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            inherited[number] = signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        (number,) = stopped.args
        command = shlex.join(["python", *sys.argv] + ["--resume"] * ("--resume" not in sys.argv))
        command = command if WORLD_SIZE == 1 else "the same command and --resume"
        clear = "\r\033[K" if is_terminal(sys.stderr) else ""  # the bar
        warn(f"{clear}{signal.Signals(number).name}: {stopped.saved}; go on with: {command}")
        sys.exit(128 + number)
    finally:
        for number, handler in inherited.items():
            signal.signal(number, handler)


def check_writable(folder):
    """Makes a folder where there is none, and a file in it: better found out now than after an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def locked(folder):
    """Makes this run the only one that writes to the folder, until it ends, however it ends.

    Where the file system or the operating system knows no locks, there is none. Of torchrun's workers the
    first one on a machine locks for all. RunError: another run is writing there.
    """
    if not fcntl or LOCAL_RANK:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            raise RunError(
                f"another run is writing to {folder.resolve()}: wait for it, or choose another --output-dir"
            ) from error
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
        warn(f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there")
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def joined_workers():
    """Joins torchrun's workers, where there are several, until the run ends; the first one alone prints."""
    if WORLD_SIZE == 1:
        yield
        return
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null if RANK else sys.stdout):
            yield
    finally:
        distributed.destroy_process_group()


def gather(value=None):
    """Waits for all workers; returns what each has given, in their order. RunError: one has stopped."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise RunError("another worker has stopped; go on with the same command and --resume") from error
    return values


def own_device(device):
    """Returns the device of this one of torchrun's workers: a GPU of its own, where there are several.

    Where there is a GPU that PyTorch cannot use, and so the CPU works, a line says so and why.
    """
    if device.type == "cuda" and device.index is None and WORLD_SIZE > 1:
        device = torch.device("cuda", LOCAL_RANK % torch.cuda.device_count())
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    has_gpu = NVIDIA.exists() or shutil.which("nvidia-smi")
    if device.type == "cpu" and has_gpu and not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "it is not available"
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
        warn(f"there is an NVIDIA GPU here, but PyTorch cannot use it: {reason}")
    return device


def keep_freed_memory():
    """Has glibc, where there is one, keep the memory of a step for the next one.

    It would give it back to the system, which clears it before it is used again: up to half of a step
    on a CPU. It keeps what is smaller than the largest tensor, up to 32 MiB, that was freed before.
    """
    torch.empty(33_000_000, dtype=torch.uint8)
