"""What goes into the linear layers of a checkpoint, and how much of it a quantization of few bits would lose.

A quantized matrix product rounds each row of its input to :data:`STEPS` steps either way of zero. How much that loses
depends on how far the largest value of a row stands out from the rest, which differs from layer to layer and is a
property of the checkpoint. It is measured on the samples on which the checkpoint is run for the parity report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

STEPS = 91
"""Steps between zero and the largest value of a row, when the input is rounded once."""


@dataclass
class InputStatistics:
    """Sums over the rows (of K values) that went into one linear layer."""

    rows: int = 0
    energy: float = 0.0
    """Of the mean square of a row."""
    largest: float = 0.0
    """Of the largest absolute value of a row, squared."""
    highest: float = 0.0
    """Of the largest value of a row."""
    highest_squared: float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Count the rows of an input (..., K)."""
        rows = x.detach().flatten(0, -2).double()
        highest = rows.amax(dim=1)
        self.rows += rows.shape[0]
        self.energy += float(rows.square().mean(dim=1).sum())
        self.largest += float(rows.abs().amax(dim=1).square().sum())
        self.highest += float(highest.sum())
        self.highest_squared += float(highest.square().sum())

    def rounding_error(self, shift: float | None) -> float | None:
        """Error of rounding the input once, relative to the input, as a root mean square; None without rows.

        Args:
            shift: what is added so that no value is negative, which doubles the number of steps; None where the input
                takes both signs.
        """
        if self.rows == 0:
            return None
        if self.energy == 0:
            return 0.0
        if shift is None:
            squared_steps = self.largest / STEPS**2
        else:
            squared_steps = (self.highest_squared + 2 * shift * self.highest + shift**2 * self.rows) / (2 * STEPS) ** 2
        return float((squared_steps / 12 / self.energy) ** 0.5)


class Activations:
    """Statistics of the inputs of linear layers, by the names of their weights."""

    def __init__(self) -> None:
        self.statistics: dict[str, InputStatistics] = {}

    def rounding_error(self, names: Iterable[str], shift: float | None) -> float | None:
        """Of the layers with these weights, the largest error (:meth:`InputStatistics.rounding_error`).

        None where one of them has not been seen.
        """
        largest = None
        for name in names:
            error = self.statistics.get(name, InputStatistics()).rounding_error(shift)
            if error is None:
                return None
            largest = max(error, largest or 0.0)
        return largest


@contextmanager
def observe(model: nn.Module) -> Iterator[Activations]:
    """Gather the statistics of every linear layer of ``model`` that runs within the block."""
    activations = Activations()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            statistics = activations.statistics.setdefault(names[id(module.weight)], InputStatistics())
            handles.append(module.register_forward_pre_hook(_recorder(statistics)))
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def _recorder(statistics: InputStatistics) -> Any:
    def record(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        statistics.add(args[0])

    return record
