"""What one machine can take, and how many machines a load needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blipstream.bench.figures import plain
from blipstream.bench.workload import Lengths
from blipstream.errors import InvalidRequestError
from blipstream.planning.simulator import Outcome, Question, simulate_closed, simulate_open
from blipstream.planning.stages import StageTimes

LIMITED = ("ttft", "e2el")
_HALVINGS = 14
"""Of the interval in which the capacity lies: to a ten-thousandth of it."""
_SATURATING = 64
"""Clients that keep every stage busy."""
_SEED = 0


@dataclass(frozen=True)
class Answer:
    """A plan.

    Attributes:
        alone: seconds of a request on an idle machine.
        saturated: requests a second that a machine answers when many wait, whatever their latency.
        capacity: requests a second that a machine answers within the limits; 0 where none is.
        machines: how many the load needs; None where no number of them is enough.
    """

    alone: float
    saturated: float
    capacity: float
    machines: int | None


def draw_questions(
    text_tokens: Lengths, output_tokens: Lengths, count: int, stages: StageTimes
) -> tuple[list[Question], int]:
    """Questions whose lengths have these distributions, and how many had to be cut to what the bundle has room for.

    Raises:
        InvalidRequestError: there is no room for the mean lengths.
    """
    prompt = stages.image_tokens + math.ceil(text_tokens.mean)
    if output_tokens.mean > stages.room_after(prompt):
        raise InvalidRequestError(
            f"the bundle has room for {stages.room_after(prompt)} tokens after an image and {plain(text_tokens.mean)} "
            f"of text, but answers are to have {plain(output_tokens.mean)}"
        )
    rng = np.random.default_rng(_SEED)
    asked = [
        Question(*lengths) for lengths in zip(text_tokens.draw(rng, count), output_tokens.draw(rng, count), strict=True)
    ]
    cut = [_cut(question, stages) for question in asked]
    return cut, sum(one != other for one, other in zip(asked, cut, strict=True))


def _cut(question: Question, stages: StageTimes) -> Question:
    """To a prompt that leaves room for a token, and to as many tokens as there is room for."""
    text = min(question.text_tokens, stages.max_prompt_tokens - stages.image_tokens)
    return Question(text, min(question.output_tokens, stages.room_after(stages.image_tokens + text)))


def plan(
    stages: StageTimes, questions: Sequence[Question], rate: float, limits: Mapping[str, float], percentile: float
) -> Answer:
    """Simulate machines with these stages under the load.

    Args:
        stages: of one machine.
        questions: what is asked, in the order of arrival; some hundreds, for the percentile's sake.
        rate: requests a second, of the whole load.
        limits: milliseconds by name, ``ttft`` or ``e2el``.
        percentile: of the requests must keep to the limits, 0 to 100.
    """
    alone = np.median([own.e2el for own in simulate_closed(stages, questions[:20], 1)])
    saturated = throughput(simulate_closed(stages, questions, _SATURATING))
    found = capacity(stages, questions, limits, percentile, saturated)
    return Answer(float(alone), saturated, found, math.ceil(rate / found) if found else None)


def capacity(
    stages: StageTimes,
    questions: Sequence[Question],
    limits: Mapping[str, float],
    percentile: float,
    saturated: float,
) -> float:
    """The highest rate at which the percentile keeps to every limit, by halving below ``saturated``."""

    def keeps(rate: float) -> bool:
        outcomes = simulate_open(stages, questions, rate, _SEED)
        return all(
            np.percentile([getattr(own, name) for own in outcomes], percentile) * 1000 <= limit
            for name, limit in limits.items()
        )

    low, high = 0.0, saturated
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def throughput(outcomes: Sequence[Outcome]) -> float:
    """Requests a second from the first arrival to the last answer."""
    return len(outcomes) / (max(own.done_at for own in outcomes) - min(own.sent_at for own in outcomes))
