"""What all tests share: what is skipped, in which order modules run, and what a run reports at its end."""

from __future__ import annotations

import functools
import logging
import os
import random
import signal
from collections.abc import Iterator

import pytest
import torch  # makes the logger below what it is
from torch.onnx._internal import _lazy_import

from tests.support import durations
from tests.support.servers import DEATH

QUICK_S = 15.0
"""What a whole module may take at most, of those that ``--quick`` runs."""
BUILD_TIMEOUT_S = 180
"""Of tests that may export and build, which a busy machine makes slow; all others have a minute."""
BUILDING = {"random_bundle", "exported"}
"""Fixtures that build."""
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Without a GPU the fused kernels run in the interpreter. It is chosen when they are imported, and the compiler's
    # own library with them, by whichever test module comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest listens to loggers that do not propagate, and to a listener torch tells the stack of every traced operation.
logging.getLogger("torch.__trace").propagate = True

# For each graph the exporter reads the sources of all its operators again: 0.4 s, some 250 times in a run.
if hasattr(_lazy_import, "onnxscript_apis"):
    apis = _lazy_import.onnxscript_apis
    apis.get_torchlib_ops = functools.cache(lambda: type(apis).__getattr__(apis, "get_torchlib_ops")())

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the suite in the background ignores it, and the commands that tests interrupt inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="run the tests marked large as well")
    parser.addoption("--quick", action="store_true", help="leave out servers, builds and modules known to be slow")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="shuffle the tests within each module")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--shuffle")
    return None if seed is None else f"shuffled: --shuffle {seed}"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for item in items:
        if item.get_closest_marker("large") and not config.getoption("--large"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and gigabytes: give pytest --large"))
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if not module_of(item).startswith(("tests/unit/", "tests/server/")) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S))
    if config.getoption("--quick"):
        slow = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    seed = config.getoption("--shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
    yield  # pytest itself brings together what shares a parameter of a fixture
    order_modules(items)


def is_quick(item: pytest.Item) -> bool:
    if BUILDING & set(getattr(item, "fixturenames", ())) or durations.load().get(module_of(item), 0) >= QUICK_S:
        return False
    return not any(item.get_closest_marker(name) for name in ("server", "slow", "large"))


def module_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def order_modules(items: list[pytest.Item]) -> None:
    """The slowest modules first, so no worker is left with one at the end; each module's tests together."""
    table = durations.load()
    modules = [module_of(item) for item in items]
    rank = {name: (-table.get(name, durations.UNKNOWN_S), name) for name in modules}
    order = sorted(range(len(items)), key=lambda i: (rank[modules[i]], i))
    items[:] = [items[i] for i in order]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every server that died, whatever became of its test."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    deaths = {
        (report.nodeid, value)
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == DEATH
    }
    for test, death in sorted(deaths):
        terminalreporter.section("a server died", sep="!", red=True)
        terminalreporter.line(f"{test}: {death}")
