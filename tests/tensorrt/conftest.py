"""TensorRT's Python bindings, with no GPU and no TensorRT: see :mod:`tests.tensorrt.standins`."""

from __future__ import annotations

import pytest

from tests.tensorrt import standins
from tests.tensorrt.standins import Bindings


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """The bindings with nothing behind them: every name is there."""
    return _make(tmp_path_factory, lean=False)


@pytest.fixture(scope="session")
def lean_bindings(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    """The bindings with the lean runtime behind them: there is a plugin registry."""
    return _make(tmp_path_factory, lean=True)


def _make(tmp_path_factory: pytest.TempPathFactory, *, lean: bool) -> Bindings:
    if reason := standins.missing(lean=lean):
        pytest.skip(reason)
    return standins.make(tmp_path_factory.mktemp("bindings"), lean=lean)
