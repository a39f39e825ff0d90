"""How a run ends: errors, signals and standard output."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import torch

saved = ""  # status for the message printed when a run ends early: which epoch was saved where
SIGNALS = {
    "SIGINT": "Interrupted",
    "SIGTERM": "Terminated",
    "SIGHUP": "Disconnected",
    "SIGBREAK": "Interrupted",  # Ctrl-Break on Windows
    "SIGUSR1": "Terminated",  # as job schedulers do before SIGKILL
    "SIGUSR2": "Terminated",
    "SIGXCPU": "Terminated",
}


class RunError(Exception):
    """An expected error, reported to the user as one line without a traceback."""


class Stopped(BaseException):
    """Raised by the signal handler. A BaseException, so that `except Exception` does not catch it."""


def warn(text):
    """Prints a line on standard error, if that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def exit_on_error(*kinds, memory_advice="choose another --device"):
    """Turns RunError, OSError, `kinds` and running out of memory into a one-line message and exit status 1.

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
    except OSError as error:  # standard output is replaced, so that the interpreter can flush it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            message = f"standard output cannot be written ({error.strerror})"
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}" + f" ({saved})" * bool(saved))


def line_buffer_stdout():
    """Makes each printed line appear at once, and replaces characters that standard output cannot encode."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


@contextlib.contextmanager
def exit_on_signals():
    """Exits on the signals in `SIGNALS` with a message about what is saved and how to resume.

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

    for name in SIGNALS:
        number = getattr(signal, name, None)  # each platform has some of them
        if in_main_thread and number and signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, stop)
    try:
        yield
    except Stopped as stopped:
        (number,) = stopped.args
        advice = f"{saved}; to resume, add --resume to the same command" if saved else "nothing is saved yet"
        warn(f"{SIGNALS[signal.Signals(number).name]}: {advice}")
        sys.exit(128 + number)
    finally:
        saved = ""  # a notebook may run another script next
        for number, handler in previous.items():
            signal.signal(number, handler)
