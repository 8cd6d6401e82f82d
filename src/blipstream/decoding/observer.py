"""What the decode loop tells about itself: plain numbers, for metrics and logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_log = logging.getLogger(__name__)

Fact = TypeVar("Fact")


@dataclass
class StepReport:
    """One iteration of the loop."""

    running: int = 0
    """Sequences that hold a slot after it."""
    waiting: int = 0
    """Requests that wait for a slot after it."""
    prefill_tokens: int = 0
    """Prompt tokens prefilled, soft tokens included and padding not."""
    generated_tokens: int = 0
    """Tokens generated, those that follow a prefill included."""
    prefill_seconds: float = 0.0
    """Time in the decoder's prefill."""
    decode_seconds: float = 0.0
    """Time in the decoder's decode step."""
    seconds: float = 0.0
    """Time of the whole iteration."""


class LoopObserver:
    """Told by the loop, on its thread, what happens. Subclass it; it ignores everything. Its methods must not block."""

    def on_step(self, report: StepReport) -> None:
        """An iteration has ended."""

    def on_start(self, queue_seconds: float) -> None:
        """A request has got a slot, this long after it arrived."""

    def on_first_token(self, seconds: float) -> None:
        """A request's first token was generated, this long after it arrived."""

    def on_end(self, outcome: str) -> None:
        """A request has ended: the value of a :class:`~blipstream.decoding.request.FinishReason`, or ``error``."""


class GuardedObserver(LoopObserver):
    """Passes everything on and logs the exceptions of the other: a metric at fault must not stop the loop."""

    def __init__(self, observer: LoopObserver) -> None:
        self._observer = observer

    def on_step(self, report: StepReport) -> None:
        """Pass it on."""
        _guarded(self._observer.on_step, report)

    def on_start(self, queue_seconds: float) -> None:
        """Pass it on."""
        _guarded(self._observer.on_start, queue_seconds)

    def on_first_token(self, seconds: float) -> None:
        """Pass it on."""
        _guarded(self._observer.on_first_token, seconds)

    def on_end(self, outcome: str) -> None:
        """Pass it on."""
        _guarded(self._observer.on_end, outcome)


def _guarded(tell: Callable[[Fact], None], fact: Fact) -> None:
    try:
        tell(fact)
    except Exception:
        _log.exception("the observer of the decode loop failed")
