"""What all tests share."""

from __future__ import annotations

import logging

import torch  # noqa: F401  # it makes the logger below what it is

# pytest listens to loggers that do not propagate, and to a listener torch tells the stack of every traced operation.
logging.getLogger("torch.__trace").propagate = True
