"""What has to be settled before PyTorch is imported; both scripts import this first."""

import sys

if sys.version_info < (3, 10):
    sys.exit("this project needs Python 3.10 or newer; this is Python {}.{}".format(*sys.version_info))


def show_exception(kind, error, traceback, shown_by=sys.excepthook):
    """Shows an error as before, but nothing at Ctrl-C: the imports take a second."""
    if not issubclass(kind, KeyboardInterrupt):
        shown_by(kind, error, traceback)


sys.excepthook = show_exception
