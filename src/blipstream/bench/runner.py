"""Running loads one after the other, with progress shown, until they are done or interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from blipstream.bench.figures import figures_of, plain
from blipstream.bench.load import Record, Request, Run, Target
from blipstream.bench.meter import Meter
from blipstream.bench.report import Result
from blipstream.bench.workload import Workload
from blipstream.errors import InvalidRequestError, ServerUnavailableError

RATES = (0.001, 1_000_000.0)
"""Arrivals a second: the fewest and the most."""


@dataclass(frozen=True)
class Load:
    """What clients do: so many of them send when they are answered, or requests arrive at a rate.

    Attributes:
        concurrency: clients; 0 with a rate.
        request_rate: arrivals a second; 0 with clients.
    """

    concurrency: int = 0
    request_rate: float = 0.0

    def __str__(self) -> str:
        if self.concurrency == 1:
            return "1 client"
        return f"{self.concurrency} clients" if self.concurrency else f"{plain(self.request_rate)} a second"

    def drive(self, run: Run, seed: int) -> None:
        """Send all requests of a run."""
        if self.concurrency:
            run.closed(self.concurrency)
        else:
            run.open(self.request_rate, seed)


def make_loads(concurrency: Sequence[int], rates: Sequence[float]) -> list[Load]:
    """The loads of a run; one client if nothing is said.

    Raises:
        InvalidRequestError: both are given, or a rate is out of range.
    """
    if concurrency and rates:
        raise InvalidRequestError("give clients (--concurrency) or arrivals (--request-rate), not both")
    for rate in rates:
        check_rate(rate)
    return [Load(request_rate=rate) for rate in rates] or [Load(clients) for clients in concurrency or (1,)]


def check_rate(rate: float) -> None:
    """Accept arrivals a second.

    Raises:
        InvalidRequestError: they are too few, too many or no number.
    """
    if not RATES[0] <= rate <= RATES[1]:
        low, high = map(plain, RATES)
        raise InvalidRequestError(f"a request rate must be {low} to {high} a second, but it is {rate}")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        workload: what is asked.
        loads: one after the other, each about images of its own.
        requests: that are measured, of each load.
        warmup: requests before them.
        limits: of goodput, in milliseconds.
        patience: seconds for which every request may fail before the run ends.
    """

    workload: Workload
    loads: Sequence[Load]
    requests: int
    warmup: int
    limits: Mapping[str, float]
    patience: float


class Runner:
    """Measures a plan.

    Args:
        plan: what is measured.
        target: the server.
        meter: reads what the server counts.
        setting: columns that come first in each row.
        console: shows the progress.
    """

    def __init__(self, plan: Plan, target: Target, meter: Meter, setting: Mapping[str, Any], console: Console) -> None:
        self._plan = plan
        self._target = target
        self._meter = meter
        self._setting = setting
        self._console = console
        self.results: list[Result] = []
        """Of the loads that ran, the last one perhaps not to its end."""

    def run(self) -> None:
        """Run every load.

        Raises:
            BlipstreamError: the server's own figures cannot be read, or it answers nothing any more.
            KeyboardInterrupt: Ctrl-C. What was measured is kept in either case.
        """
        for number, load in enumerate(self._plan.loads):
            with self._console.status(f"{load}: drawing images"):
                before = self._plan.workload.requests(self._plan.warmup, 2 * number)
                measured = self._plan.workload.requests(self._plan.requests, 2 * number + 1)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                self._start(progress, f"{load}: warming up", before).closed(load.concurrency or 1)
                run = self._start(progress, str(load), measured)
                self._measure(load, run)
            if run.given_up:
                raise ServerUnavailableError(
                    f"every request failed for {plain(self._plan.patience)} s, so the rest was not sent"
                )

    def _start(self, progress: Progress, title: str, requests: Sequence[Request]) -> Run:
        task = progress.add_task(title, total=len(requests))
        return Run(self._target, requests, lambda _: progress.advance(task), self._plan.patience)

    def _measure(self, load: Load, run: Run) -> None:
        before = self._meter.read()
        server: Mapping[str, Any] = {}
        try:
            load.drive(run, self._plan.workload.seed)
            server = self._meter.read().since(before)
        finally:
            records = list(run.records)  # requests that Ctrl-C has left under way may still end
            if records:
                figures = figures_of(records, self._plan.limits)
                setting = {**self._setting, **asdict(load)}
                self.results.append(Result(str(load), setting, figures, server))

    @staticmethod
    def columns(setting: Mapping[str, Any]) -> list[str]:
        """Those of the rows that a runner with this setting makes."""
        nothing = figures_of([Record(sent_at=0.0, done_at=1.0)], {})
        return list(Result("", {**setting, **asdict(Load())}, nothing).row())
