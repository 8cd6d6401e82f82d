"""Who runs next: the policy of the decode loop, in plain integers. Knows no engine, no tensor and no Triton."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from blipstream.errors import RequestTimeoutError, ServerBusyError


class Waiting(Protocol):
    """What the policy knows of a waiting request. Times are those of one clock, in seconds."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens to prefill."""
        ...

    @property
    def arrived_at(self) -> float:
        """When the request arrived."""
        ...

    @property
    def start_by(self) -> float | None:
        """When it must have a slot, if there is such a time."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether its client has cancelled it."""
        ...


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True)
class Decision(Generic[W]):
    """What becomes of the waiting requests in one iteration. Those in none of the lists go on waiting."""

    admitted: list[W]
    """To be prefilled together, now; no more than there are free slots."""
    cancelled: list[W]
    expired: list[tuple[W, RequestTimeoutError]]


class Scheduler(Generic[W]):
    """First come, first served, with a bound on the queue and on the prefill of one iteration.

    Every iteration of the loop prefills the admitted prompts and then advances all running sequences by one token. The
    bound keeps a burst of prompts from holding up the running sequences for long; and since one prompt is admitted
    whatever its length, running sequences never keep out a prompt for which there is a slot.

    Args:
        max_waiting: requests that may wait.
        prefill_budget: tokens that one iteration may prefill, padding included: prompts that are prefilled together
            are padded to the longest of them.
    """

    def __init__(self, max_waiting: int, prefill_budget: int) -> None:
        self._max_waiting = max_waiting
        self._prefill_budget = prefill_budget
        self._queue: deque[W] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting(self) -> Sequence[W]:
        """The waiting requests, in the order in which they came."""
        return tuple(self._queue)

    def add(self, request: W) -> None:
        """Put a request at the end of the queue.

        Raises:
            ServerBusyError: the queue is full.
        """
        if len(self._queue) >= self._max_waiting:
            raise ServerBusyError(f"the queue is full: {len(self._queue)} requests are waiting for a slot")
        self._queue.append(request)

    def clear(self) -> list[W]:
        """Empty the queue; return who was in it."""
        waiting = list(self._queue)
        self._queue.clear()
        return waiting

    def schedule(self, free_slots: int, now: float) -> Decision[W]:
        """Drop who was cancelled or has waited too long, then admit who fits."""
        cancelled = [request for request in self._queue if request.cancelled]
        expired = [
            (request, _timeout(request, request.start_by, now))
            for request in self._queue
            if not request.cancelled and request.start_by is not None and request.start_by < now
        ]
        gone = {id(request) for request in (*cancelled, *(request for request, _ in expired))}
        if gone:
            self._queue = deque(request for request in self._queue if id(request) not in gone)
        return Decision(self.admit(free_slots), cancelled, expired)

    def admit(self, free_slots: int) -> list[W]:
        """Take those off the queue that are to be prefilled together now."""
        admitted: list[W] = []
        longest = 0
        while self._queue and len(admitted) < free_slots:
            longest = max(longest, self._queue[0].num_prompt_tokens)
            if admitted and longest * (len(admitted) + 1) > self._prefill_budget:
                break
            admitted.append(self._queue.popleft())
        return admitted


def _timeout(request: Waiting, start_by: float, now: float) -> RequestTimeoutError:
    waited, timeout = now - request.arrived_at, start_by - request.arrived_at
    return RequestTimeoutError(f"the request waited {waited:.3f} s for a slot, and its timeout is {timeout:.3f} s")
