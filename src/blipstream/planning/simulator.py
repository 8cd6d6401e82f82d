"""A server as a queue of images, a decode loop and the cores that both share, in simulated time.

What is modelled: batches of images as Triton's dynamic batcher makes them (all that wait, when the last batch is done);
the decode loop's iterations (a prefill of waiting prompts within the budget, then a step of all rows); rows, which
waiting prompts take as they come free; and two things that compute at once, each at half speed and with what they lose
to each other. Not modelled: the network, preprocessing, caches, and requests that give up.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from blipstream.decoding.scheduler import Scheduler
from blipstream.planning.stages import StageTimes


@dataclass(frozen=True)
class Question:
    """What one request asks of the server: tokens of its text, and of the answer."""

    text_tokens: int
    output_tokens: int


@dataclass
class Outcome:
    """One request in simulated seconds."""

    sent_at: float
    first_token_at: float = 0.0
    done_at: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first_token_at - self.sent_at

    @property
    def e2el(self) -> float:
        """Seconds to the last one."""
        return self.done_at - self.sent_at


def simulate_open(stages: StageTimes, questions: Sequence[Question], rate: float, seed: int = 0) -> list[Outcome]:
    """Let the questions arrive at ``rate`` a second, with the gaps of a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(questions))
    server = _Server(stages)
    for question, arrival in zip(questions, np.cumsum(gaps), strict=True):
        server.arrive(question, float(arrival))
    return server.run()


def simulate_closed(stages: StageTimes, questions: Sequence[Question], concurrency: int) -> list[Outcome]:
    """Let so many clients ask, each its next question when its last one is answered."""
    server = _Server(stages, deque(questions[concurrency:]))
    for question in questions[:concurrency]:
        server.arrive(question, 0.0)
    return server.run()


@dataclass
class _Job:
    """Something that computes."""

    left: float
    """Seconds of an idle machine."""


@dataclass
class _Sequence:
    """A request on its way through the server, as its scheduler sees it."""

    outcome: Outcome
    num_prompt_tokens: int
    left: int
    """Tokens that it is still to generate."""
    start_by: float | None = None
    cancelled: bool = False

    @property
    def arrived_at(self) -> float:
        return self.outcome.sent_at


class _Server:
    """Events in simulated time: arrivals, the end of a batch of images, the end of an iteration."""

    def __init__(self, stages: StageTimes, next_questions: deque[Question] | None = None) -> None:
        self._stages = stages
        self._next = next_questions or deque()
        self._now = 0.0
        self._order = count()
        self._arrivals: list[tuple[float, int, Question]] = []
        self._images: deque[_Sequence] = deque()
        self._batch: list[_Sequence] = []
        self._waiting: Scheduler[_Sequence] = Scheduler(sys.maxsize, stages.prefill_budget)
        self._admitted: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._jobs: dict[str, _Job] = {}
        self._outcomes: list[Outcome] = []

    def arrive(self, question: Question, at: float) -> None:
        """Let a question arrive."""
        heapq.heappush(self._arrivals, (at, next(self._order), question))

    def run(self) -> list[Outcome]:
        """Run until all is answered; the outcomes, in the order of arrival."""
        while self._arrivals or self._jobs:
            self._advance()
            while self._arrivals and self._arrivals[0][0] <= self._now:
                at, _, question = heapq.heappop(self._arrivals)
                outcome = Outcome(at)
                self._outcomes.append(outcome)
                prompt = self._stages.image_tokens + question.text_tokens
                self._images.append(_Sequence(outcome, prompt, question.output_tokens))
            self._start_images()
            self._start_iteration()
        return self._outcomes

    def _advance(self) -> None:
        """To the next arrival or the next end of a job; jobs that run together share the machine."""
        speed = 1.0 if len(self._jobs) < 2 else self._stages.overlap / len(self._jobs)
        end = min((job.left / speed for job in self._jobs.values()), default=float("inf"))
        arrival = self._arrivals[0][0] - self._now if self._arrivals else float("inf")
        elapsed = max(0.0, min(end, arrival))
        self._now += elapsed
        for job in self._jobs.values():
            job.left -= elapsed * speed
        if end <= arrival:
            self._end(min(self._jobs, key=lambda name: self._jobs[name].left))

    def _end(self, name: str) -> None:
        del self._jobs[name]
        if name == "images":
            for own in self._batch:
                self._waiting.add(own)
        elif name == "prefill":
            self._generate(self._admitted)
            self._running += [own for own in self._admitted if own.left]
            self._admitted = []
            if self._running:
                self._jobs["step"] = _Job(self._stages.step_s(len(self._running)))
        else:
            self._generate(self._running)
            self._running = [own for own in self._running if own.left]

    def _generate(self, sequences: Sequence[_Sequence]) -> None:
        for own in sequences:
            own.outcome.first_token_at = own.outcome.first_token_at or self._now
            own.left -= 1
            if not own.left:
                own.outcome.done_at = self._now
                if self._next:
                    self.arrive(self._next.popleft(), self._now)

    def _start_images(self) -> None:
        if self._images and "images" not in self._jobs:
            size = min(len(self._images), self._stages.max_images)
            self._batch = [self._images.popleft() for _ in range(size)]
            self._jobs["images"] = _Job(self._stages.images_s(size))

    def _start_iteration(self) -> None:
        if "prefill" in self._jobs or "step" in self._jobs:
            return
        self._admitted = self._waiting.admit(self._stages.max_sequences - len(self._running))
        if self._admitted:
            padded = len(self._admitted) * max(own.num_prompt_tokens for own in self._admitted)
            self._jobs["prefill"] = _Job(self._stages.prefill_s(padded))
        elif self._running:
            self._jobs["step"] = _Job(self._stages.step_s(len(self._running)))
