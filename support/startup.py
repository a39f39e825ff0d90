"""What has to be settled before PyTorch is imported; both scripts import this first."""

import os
import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("this project needs Python 3.10 or newer; this is Python {}.{}".format(*sys.version_info))

# A step is a hundred pieces of work, each for all threads together, and a thread that has done its part
# spins until the others have. Beside another process, or another run, the others may not even be running,
# and a step takes 80 times as long; it takes twice as long where each thread stays on a core of its own and
# soon stops to spin. libgomp reads this when it is loaded. Not where the user has said otherwise, torchrun's
# included, nor in a notebook, whose process is not this script's, nor where a GPU does the work.
THREADS = {"OMP_PLACES": "cores", "OMP_PROC_BIND": "close", "GOMP_SPINCOUNT": "10000"}


def is_own_process():
    """Whether a script of this project's top folder was started, and by no notebook or interpreter."""
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    return Path(script).resolve().parent == Path(__file__).resolve().parent.parent and not hasattr(sys, "ps1")


def show_exception(kind, error, traceback, shown_by=sys.excepthook):
    """Shows an error as before, but nothing at Ctrl-C: the imports take a second."""
    if not issubclass(kind, KeyboardInterrupt):
        shown_by(kind, error, traceback)


if is_own_process():
    sys.excepthook = show_exception
    is_set = any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in os.environ)
    if sys.platform == "linux" and not is_set and not Path("/dev/nvidia0").exists():
        os.environ.update(THREADS)
