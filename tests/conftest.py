"""What all tests share."""

from __future__ import annotations

import logging
import signal

import torch  # noqa: F401  # it makes the logger below what it is

# pytest listens to loggers that do not propagate, and to a listener torch tells the stack of every traced operation.
logging.getLogger("torch.__trace").propagate = True

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the suite in the background ignores it, and the commands that tests interrupt inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
