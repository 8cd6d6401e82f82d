"""A peer and Blipstream, round by round in turn, on the same requests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.compare.tasks import Requests, Task, tokens_of

WARM_UP = 999
"""Number of the round that is not counted."""
_WARM_UP_TOKENS = 3


class Asked(Protocol):
    """What answers jobs."""

    def ask(self, job: dict[str, Any]) -> Mapping[str, Any]:
        """Have a job done."""
        ...


@dataclass(frozen=True)
class Side:
    """One of the two in all rounds."""

    seconds: tuple[float, ...]
    outputs: tuple[Any, ...]
    """Tokens of each request, or an array."""

    @property
    def median(self) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Pair:
    """A peer beside Blipstream."""

    peer: Side
    ours: Side

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as long the peer takes, of each round."""
        return tuple(peer / ours for peer, ours in zip(self.peer.seconds, self.ours.seconds, strict=True))


class Rounds:
    """One task on both sides.

    Args:
        task: what is asked.
        first: number of the first round; another one has other requests.
        folder: for files.
        batch: requests that the peer is given at once; 0 for all.
        on_round: called before each round, with its number.
    """

    def __init__(self, task: Task, first: int, folder: Path, batch: int, on_round: Callable[[int], None]) -> None:
        self.task = task
        self.batch = batch or task.count
        self._first = first
        self._folder = folder
        self._on_round = on_round

    def run(self, peer: Asked, ours: Asked, count: int) -> Pair:
        """So many rounds, after one that is not counted; another side begins in each."""
        sides = [(peer, self.batch), (ours, self.task.count)]
        taken: list[list[tuple[float, Any]]] = [[], []]
        self._on_round(0)
        for side, batch in sides:
            self._warm_up(side, batch)
        for number in range(count):
            self._on_round(number + 1)
            for index in (0, 1) if number % 2 else (1, 0):
                taken[index].append(self._timed(*sides[index], number))
        return Pair(*(Side(*zip(*own, strict=True)) for own in taken))

    def alone(self, side: Asked, batch: int, count: int) -> Side:
        """The same rounds for one side."""
        self._on_round(0)
        self._warm_up(side, batch)
        taken = []
        for number in range(count):
            self._on_round(number + 1)
            taken.append(self._timed(side, batch, number))
        return Side(*zip(*taken, strict=True))

    def _warm_up(self, side: Asked, batch: int) -> None:
        requests = [_shortened(request, self.task.count) for request in self._requests(WARM_UP)]
        self._ask(side, requests[:batch], batch)

    def _timed(self, side: Asked, batch: int, number: int) -> tuple[float, Any]:
        """Seconds, and what was answered."""
        requests = self._requests(number)
        started = time.perf_counter()
        output = self._ask(side, requests, batch)
        return time.perf_counter() - started, output

    def _requests(self, number: int) -> Requests:
        return self.task.requests(self._first + number, self._folder)

    def _ask(self, side: Asked, requests: Requests, batch: int) -> Any:
        """Tokens, or the array; batches of arrays are not asked for."""
        file = self._folder / "output.npy"
        tokens: list[list[int]] = []
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            found = side.ask({"task": self.task.name, "requests": part, "output": str(file)})
            if "tokens" not in found:
                return np.load(file)
            tokens += found["tokens"]
        lengths = [len(ids) for ids in tokens]
        if sum(lengths) != tokens_of(requests):
            raise ValueError(f"answers must have {[r['tokens'] for r in requests]} tokens, but they have {lengths}")
        return tokens


def _shortened(request: dict[str, Any], count: int) -> dict[str, Any]:
    """Few tokens in the warm-up of many requests; as many as ever of one, for which forms are compiled."""
    return {**request, "tokens": _WARM_UP_TOKENS} if count > 1 and "tokens" in request else request
