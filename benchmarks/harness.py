"""The closed loop: ``concurrency`` virtual clients, each of which sends its next request when its last one is answered.

It knows neither Blipstream nor transformers: a :class:`System` is anything that answers a request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """An encoded image file and a prompt; an empty prompt asks for a caption."""

    image: bytes
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What a system answers to one request."""

    token_ids: tuple[int, ...]
    """The generated tokens, the end token included."""
    first_token_at: float
    """``time.perf_counter()`` when the first of them was out."""


class System(Protocol):
    """Something that is measured. ``answer`` blocks until the whole answer is there; many threads call it at once."""

    name: str

    def answer(self, request: Request) -> Answer:
        """Answer one request."""


@dataclass(frozen=True)
class Record:
    """One request as its client saw it; times in seconds from ``time.perf_counter()``."""

    sent_at: float
    first_token_at: float
    done_at: float
    token_ids: tuple[int, ...]

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.first_token_at - self.sent_at

    @property
    def request_latency(self) -> float:
        """Seconds from sending to the end of the answer."""
        return self.done_at - self.sent_at

    @property
    def inter_token_latency(self) -> float:
        """Mean seconds between two tokens after the first; NaN for an answer of one token."""
        later = len(self.token_ids) - 1
        return (self.done_at - self.first_token_at) / later if later > 0 else float("nan")


@dataclass(frozen=True)
class Figures:
    """What one run of the closed loop came to. Times in milliseconds, throughputs per second."""

    request_throughput: float
    output_token_throughput: float
    time_to_first_token_p50: float
    time_to_first_token_p95: float
    inter_token_latency_p50: float
    inter_token_latency_p95: float
    request_latency_p50: float
    request_latency_p95: float


def run_closed_loop(system: System, requests: Sequence[Request], concurrency: int) -> list[Record]:
    """Let ``concurrency`` clients send all ``requests``; return the records in the order of the requests.

    Raises:
        Exception: the first failure of ``system``; requests that were not sent by then are not sent.
    """

    def send(request: Request) -> Record:
        sent_at = time.perf_counter()
        answer = system.answer(request)
        return Record(sent_at, answer.first_token_at, time.perf_counter(), answer.token_ids)

    with ThreadPoolExecutor(concurrency, thread_name_prefix="client") as clients:
        return list(clients.map(send, requests))  # a thread takes the next request when it is done with its last


def figures_of(records: Sequence[Record]) -> Figures:
    """Sum up the records of one run; its duration is from the first sending to the last answer."""
    elapsed = max(record.done_at for record in records) - min(record.sent_at for record in records)
    first = _percentiles([record.time_to_first_token for record in records])
    between = _percentiles([record.inter_token_latency for record in records])
    whole = _percentiles([record.request_latency for record in records])
    return Figures(
        len(records) / elapsed, sum(len(record.token_ids) for record in records) / elapsed, *first, *between, *whole
    )


def share_equal(records: Sequence[Record], reference: Sequence[Record]) -> float:
    """Share of the requests whose tokens are those of ``reference``, records of the same requests."""
    pairs = zip(records, reference, strict=True)
    return sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs) / len(reference)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 95th percentile in milliseconds, without NaN."""
    known = [value for value in seconds if value == value]
    if not known:
        return float("nan"), float("nan")
    p50, p95 = np.percentile(known, (50, 95)) * 1000
    return float(p50), float(p95)
