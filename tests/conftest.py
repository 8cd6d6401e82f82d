"""What all tests share."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch  # makes the logger below what it is

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Without a GPU the fused kernels run in the interpreter. It is chosen when they are imported, and the compiler's
    # own library with them, by whichever test module comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest listens to loggers that do not propagate, and to a listener torch tells the stack of every traced operation.
logging.getLogger("torch.__trace").propagate = True

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the suite in the background ignores it, and the commands that tests interrupt inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="run the tests marked large as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("large") and not config.getoption("--large"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and gigabytes: give pytest --large"))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
