"""How a run ends: expected errors, signals and closed streams."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

import torch

SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"  # job schedulers send SIGUSR1 before SIGKILL


class RunError(Exception):
    """An expected error, reported to the user as one line without a traceback."""


def warn(text):
    """Prints a line on standard error, if that is open."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)


def is_out_of_memory(error):
    """Returns True if an exception, or one that it was raised in response to, means a lack of memory."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if "DefaultCPUAllocator" in str(error):  # PyTorch has an exception type for CUDA only
            return True
        error = error.__context__  # a CUDA graph whose capture has failed raises another exception
    return False


@contextlib.contextmanager
def exit_on_error(*kinds, memory_advice="choose another --device"):
    """Turns RunError, OSError, `kinds` and running out of memory into a one-line message and exit status 1.

    All other exceptions propagate. If the exception has an attribute `saved`, such as "epoch 3 is saved in
    last_Model_3.pth", the message ends with it.
    """
    try:
        yield
        return
    except Exception as error:
        caught = error
    if is_out_of_memory(caught):
        message = f"out of memory: {memory_advice}"
    elif isinstance(caught, BrokenPipeError):
        message = "standard output was closed"
    elif isinstance(caught, (RunError, OSError, *kinds)):
        message = str(caught)
    else:
        raise caught
    try:
        print(end="", flush=True)
    except OSError as error:  # standard output is replaced, so that the interpreter can flush it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            message = f"standard output cannot be written ({error.strerror})"
    if hasattr(caught, "saved"):
        message += f" ({caught.saved})"
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def line_buffer_stdout():
    """Makes each printed line appear at once, and replaces characters that standard output cannot encode."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


@contextlib.contextmanager
def exit_on_signals():
    """Turns `SIGNALS` into KeyboardInterrupt, and KeyboardInterrupt into a line and exit status 130.

    The line says what is saved (the attribute `saved` of the exception) and how to resume. An interruption is
    safe at any point because files are written atomically. Signals that were ignored at the start stay
    ignored, as with nohup or in the background of a script. Outside the main thread, in which Python allows
    no handlers, nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has only some of them
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        if hasattr(error, "saved"):
            warn(f"Interrupted: {error.saved}; to resume, add --resume to the same command")
        else:
            warn("Interrupted: nothing is saved yet")
        sys.exit(130)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
