"""How a run ends and what it shares with other processes: errors, signals, standard output, directories."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows, where two runs in one directory are not detected
    fcntl = None

saved = ""  # which epoch is saved where, for the message with which a run ends early


class Stopped(BaseException):
    """Raised by the signal handler. A BaseException, so that `except Exception` does not catch it."""


class RunError(Exception):
    """An expected error, reported to the user without a traceback."""


def warn(text):
    """Prints a line on standard error, if that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def exit_on_error(*kinds, memory_advice="choose another --device"):
    """Turns expected errors (`kinds`, OSError, out of memory) into a one-line message and exit status 1.

    All other exceptions propagate.
    """
    try:
        yield
        return
    except (RunError, OSError, *kinds) as error:
        message = "standard output was closed" if isinstance(error, BrokenPipeError) else str(error)
    except (MemoryError, RuntimeError) as error:
        # PyTorch has an exception type for CUDA only; on the CPU, its allocator is named in the message.
        is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_known and "DefaultCPUAllocator" not in str(error):
            raise
        message = f"out of memory: {memory_advice}"
    try:
        print(end="", flush=True)
    except OSError:  # standard output is replaced, so that the interpreter can flush it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}" + f" ({saved})" * bool(saved))


def line_buffer_stdout():
    """Makes each printed line appear at once, and replaces characters that standard output cannot encode."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


@contextlib.contextmanager
def exit_on_signals():
    """Exits on Ctrl-C, SIGTERM and SIGHUP with a message about what is saved and how to resume.

    The handler raises `Stopped`; this is safe at any point because files are written atomically. Signals
    that were ignored at the start stay ignored, as with nohup or in the background of a script. Outside the
    main thread, in which Python allows no handlers, nothing changes.
    """
    global saved
    in_main_thread, previous = threading.current_thread() is threading.main_thread(), {}

    def stop(number, frame):
        for each in previous:
            signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the message
        raise Stopped(number)

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if in_main_thread and number and signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        (number,) = stopped.args
        reason = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}.get(number, "Disconnected")
        advice = f"{saved}; to resume, add --resume to the same command" if saved else "nothing is saved yet"
        warn(f"{reason}: {advice}")
        sys.exit(128 + number)
    finally:
        saved = ""  # a notebook may run another script next
        for number, handler in previous.items():
            signal.signal(number, handler)


def make_writable(folder):
    """Creates a directory if needed, and a file in it. Raises RunError or OSError if that fails."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is not a directory")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}.tmp"
    probe.touch()
    with contextlib.suppress(OSError):  # some file systems do not allow files to be deleted
        probe.unlink()


@contextlib.contextmanager
def locked(folder):
    """Holds an exclusive lock on a directory until the run ends. Raises RunError if another run holds it.

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
