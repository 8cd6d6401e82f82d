"""``tensorrt.plugin``, simulated: plugins are known by name, and the simulated builder runs what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

REGISTERED: list[str] = []


def register(plugin_id: str) -> Callable[[Any], Any]:
    REGISTERED.append(plugin_id)
    return lambda function: function


def autotune(plugin_id: str) -> Callable[[Any], Any]:
    return lambda function: function


def aot_impl(plugin_id: str) -> Callable[[Any], Any]:
    return lambda function: function


class TensorDesc:
    pass


class AutoTuneCombination:
    pass


class KernelLaunchParams:
    pass


class SymExprs:
    pass
