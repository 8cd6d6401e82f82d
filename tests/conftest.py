"""What all tests share."""

from __future__ import annotations

import logging
import signal

import pytest
import torch  # noqa: F401  # it makes the logger below what it is

# pytest listens to loggers that do not propagate, and to a listener torch tells the stack of every traced operation.
logging.getLogger("torch.__trace").propagate = True

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the suite in the background ignores it, and the commands that tests interrupt inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="run the tests marked large as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--large"):
        return
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and gigabytes: give pytest --large"))
