"""The lifeline between the launcher and ``blip2``: a pipe whose end means that the server is to stop.

Triton unloads a decoupled model only when all its requests are answered, and tells it nothing before; without a hint, a
stop would wait for the longest answer, or for Triton's exit timeout and then for ever. The launcher's guard holds the
pipe's write end; it closes it when the server is to stop, and the operating system does when the guard dies.
"""

from __future__ import annotations

import os
from collections.abc import Callable

LIFELINE_VARIABLE = "BLIPSTREAM_LIFELINE_FD"
"""Environment variable with the file descriptor of the pipe's read end."""


def watch_lifeline(descriptor: int, stop: Callable[[], None]) -> None:
    """Block until the pipe ends, then call ``stop``."""
    while os.read(descriptor, 1):
        pass
    stop()
