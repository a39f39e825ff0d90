"""Process setup that must run before PyTorch is imported. Both scripts import this module first."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if sys.version_info < (3, 10):
    sys.exit("this project needs Python 3.10 or newer; this is Python {}.{}".format(*sys.version_info))
for name in ("torch", "torchvision", "tqdm", "torchsummary"):
    if not importlib.util.find_spec(name):
        advice = f"activate the virtual environment, or: {sys.executable} -m pip install -r requirements.txt"
        sys.exit(f"{name} is not installed for this Python: {advice}")

script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if script.resolve().parent == ROOT and not hasattr(sys, "ps1"):  # a script of this project, not a notebook
    # A training step has about a hundred parallel regions. Between them, the threads of libgomp spin by
    # default, which takes CPU time from other processes. libgomp reads this variable when it is loaded.
    # A user's own settings are kept.
    if not any(name.startswith(("OMP_", "GOMP_", "KMP_")) for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C interrupts the imports
