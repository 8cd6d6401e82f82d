"""The load: a closed loop of clients, or arrivals at a rate, whatever the server makes of them.

In an open loop a request's time counts from the moment at which it was to arrive, also when this process was late to
send it: a slow server cannot slow down the load by which it is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from blipstream.errors import BlipstreamError

MOST_OPEN = 512
"""Requests that are under way at once at most; later arrivals wait for their turn, and the wait counts."""


@dataclass(frozen=True)
class Request:
    """An image file, a prompt, and how many tokens the answer is to have."""

    image: bytes
    prompt: str
    output_tokens: int


class Target(Protocol):
    """A server; many threads send to it at once."""

    def send(self, request: Request, on_tokens: Callable[[int], None]) -> None:
        """Send a request; call ``on_tokens`` with the number of tokens of each response as it comes.

        Raises:
            BlipstreamError: the server refused or failed.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@dataclass
class Record:
    """One request as its client saw it; times in seconds of ``time.perf_counter``."""

    sent_at: float
    done_at: float = 0.0
    responses: list[tuple[float, int]] = field(default_factory=list)
    """When each response came, and how many tokens were in it."""
    error: str = ""
    asked: int = 0
    """Tokens that the answer was to have."""

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return sum(count for _, count in self.responses)


class Run:
    """One load on one target; its records are there also when it is interrupted.

    Args:
        target: the server.
        requests: what is sent, in this order.
        on_done: called with each record as it ends, from several threads.
        patience: seconds for which every request may fail before the rest is not sent.
    """

    def __init__(
        self,
        target: Target,
        requests: Sequence[Request],
        on_done: Callable[[Record], None],
        patience: float = float("inf"),
    ) -> None:
        self._target = target
        self._requests = requests
        self._on_done = on_done
        self._patience = patience
        self._failing_since: float | None = None
        self.given_up = False
        """Whether the patience came to its end."""
        self._lock = threading.Lock()
        self.records: list[Record] = []
        """Of the requests that have ended."""

    def closed(self, concurrency: int) -> None:
        """Let ``concurrency`` clients send all requests, each its next one when its last one is answered."""
        with _Clients(concurrency) as clients:
            for request in self._requests:
                clients.submit(partial(self._send, request))

    def open(self, rate: float, seed: int) -> None:
        """Let the requests arrive at ``rate`` a second, with the gaps of a Poisson process."""
        gaps = np.random.default_rng(seed).exponential(1 / rate, len(self._requests))
        start = time.perf_counter()
        with _Clients(min(MOST_OPEN, len(self._requests))) as clients:
            for request, offset in zip(self._requests, np.cumsum(gaps) - gaps[0], strict=True):
                if self.given_up:
                    break
                arrival = start + float(offset)
                time.sleep(max(0.0, arrival - time.perf_counter()))
                clients.submit(partial(self._send, request, arrival))

    def _send(self, request: Request, arrival: float | None = None) -> None:
        if self.given_up:
            return
        record = Record(time.perf_counter() if arrival is None else arrival, asked=request.output_tokens)
        try:
            self._target.send(request, lambda count: record.responses.append((time.perf_counter(), count)))
        except BlipstreamError as error:
            record.error = str(error)
        record.done_at = time.perf_counter()
        with self._lock:
            self.records.append(record)
            if not record.error:
                self._failing_since = None
            elif self._failing_since is None:
                self._failing_since = record.done_at
            elif record.done_at - self._failing_since > self._patience:
                self.given_up = True
        self._on_done(record)


class _Clients:
    """Threads that do what they are given; what fails in one is raised here in the end, the first of it.

    An exception in this thread, as of Ctrl-C, leaves behind what has not begun.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="client")
        self._work: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        self._work.append(self._pool.submit(work))

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            self._pool.shutdown(wait=kind is None)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)  # also when Ctrl-C ended the waiting
        for work in self._work if kind is None else ():
            work.result()
