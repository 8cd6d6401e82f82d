"""The figures of a run, by the names of vLLM's serving benchmark.

``ttft`` is the time to the first token, ``itl`` the time between two tokens, ``tpot`` the mean of it over a request
without its first response, ``e2el`` the time of the whole request. A server may put several tokens into one response:
the gap before such a response is divided evenly among its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blipstream.bench.load import Record
from blipstream.errors import InvalidRequestError

LATENCIES = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")
"""On which goodput may set a limit."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Figures:
    """What a run came to.

    Attributes:
        duration: seconds from the first request to the last answer.
        completed: requests that were answered.
        failed: requests that were not.
        shortened: answers with fewer tokens than were asked for.
        request_throughput: answered requests per second; each has one image.
        output_throughput: tokens per second of answered requests.
        request_goodput: answered requests per second that kept to all limits; NaN without limits.
        latencies: ``mean_ttft_ms``, ``p50_ttft_ms``, ... of answered requests, in milliseconds.
        errors: how often each message came.
    """

    duration: float
    completed: int
    failed: int
    shortened: int
    request_throughput: float
    output_throughput: float
    request_goodput: float
    latencies: Mapping[str, float]
    errors: Mapping[str, int]

    def flat(self) -> dict[str, float | int]:
        """As the columns of a row."""
        plain = {name: value for name, value in self.__dict__.items() if name not in ("latencies", "errors")}
        return {name: round(value, 4) for name, value in {**plain, **self.latencies}.items()}


def plain(value: float) -> str:
    """A number to three significant digits, without an exponent."""
    return np.format_float_positional(float(f"{value:.3g}"), trim="-")


def parse_limits(texts: Sequence[str], names: Sequence[str] = LIMITED) -> dict[str, float]:
    """Read limits, each ``NAME:MILLISECONDS``.

    Raises:
        InvalidRequestError: one is something else, or one name has two.
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name in limits:
            raise InvalidRequestError(f"there may be one limit of {name}, but a second one is {text!r}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in names or not 0 < limits[name] < float("inf"):
            raise InvalidRequestError(
                f"a limit must be NAME:MILLISECONDS of {', '.join(names)}, as in ttft:500, but it is {text!r}"
            )
    return limits


def figures_of(records: Sequence[Record], limits: Mapping[str, float] | None = None) -> Figures:
    """Sum up a run of at least one request; its limits are in milliseconds."""
    answered = [record for record in records if not record.error and record.responses]
    duration = max(record.done_at for record in records) - min(record.sent_at for record in records)
    times = [_times(record) for record in answered]
    good = sum(not any(own[name] > limit for name, limit in (limits or {}).items()) for own in times)
    gaps = [gap for record in answered for gap in _gaps(record)]
    values = {"itl": gaps, **{name: [own[name] for own in times if own[name] == own[name]] for name in LIMITED}}
    return Figures(
        duration=duration,
        completed=len(answered),
        failed=len(records) - len(answered),
        shortened=sum(record.tokens < record.asked for record in answered),
        request_throughput=len(answered) / duration,
        output_throughput=sum(record.tokens for record in answered) / duration,
        request_goodput=good / duration if limits else float("nan"),
        latencies={key: value for name in LATENCIES for key, value in _summary(name, values[name]).items()},
        errors=Counter(
            record.error or "the answer had no tokens" for record in records if record.error or not record.responses
        ),
    )


def _times(record: Record) -> dict[str, float]:
    """Milliseconds; ``tpot`` is NaN of an answer that came as one response."""
    first, whole = record.responses[0][0] - record.sent_at, record.done_at - record.sent_at
    later = record.tokens - record.responses[0][1]
    tpot = (record.responses[-1][0] - record.responses[0][0]) / later if later > 0 else float("nan")
    return {"ttft": 1000 * first, "tpot": 1000 * tpot, "e2el": 1000 * whole}


def _gaps(record: Record) -> list[float]:
    """Milliseconds before each token that came after the first response."""
    gaps: list[float] = []
    for (before, _), (after, count) in zip(record.responses, record.responses[1:], strict=False):
        gaps += [1000 * (after - before) / count] * count if count else []
    return gaps


def _summary(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {f"{kind}_{name}_ms": float("nan") for kind in ("mean", *(f"p{rank}" for rank in PERCENTILES))}
    found = {f"mean_{name}_ms": float(np.mean(values))}
    for rank, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found[f"p{rank}_{name}_ms"] = float(value)
    return found
