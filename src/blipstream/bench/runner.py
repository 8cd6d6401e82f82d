"""Running loads one after the other, with progress shown, until they are done or interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from blipstream.bench.figures import figures_of
from blipstream.bench.load import Request, Run, Target
from blipstream.bench.meter import Meter
from blipstream.bench.report import Result
from blipstream.bench.workload import Workload
from blipstream.errors import InvalidRequestError


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
        return f"{self.concurrency} clients" if self.concurrency else f"{self.request_rate:g} a second"

    def drive(self, run: Run, seed: int) -> None:
        """Send all requests of a run."""
        if self.concurrency:
            run.closed(self.concurrency)
        else:
            run.open(self.request_rate, seed)


def make_loads(concurrency: Sequence[int], rates: Sequence[float]) -> list[Load]:
    """The loads of a run; one client if nothing is said.

    Raises:
        InvalidRequestError: both are given, or a rate is not above 0.
    """
    if concurrency and rates:
        raise InvalidRequestError("give clients (--concurrency) or arrivals (--request-rate), not both")
    for rate in rates:
        if not 0 < rate < float("inf"):
            raise InvalidRequestError(f"a request rate must be above 0 a second, but it is {rate}")
    return [Load(request_rate=rate) for rate in rates] or [Load(clients) for clients in concurrency or (1,)]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        workload: what is asked.
        loads: one after the other, each about images of its own.
        requests: that are measured, of each load.
        warmup: requests before them.
        limits: of goodput, in milliseconds.
    """

    workload: Workload
    loads: Sequence[Load]
    requests: int
    warmup: int
    limits: Mapping[str, float]


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
            BlipstreamError: the server's own figures cannot be read.
            KeyboardInterrupt: after keeping what was measured.
        """
        for number, load in enumerate(self._plan.loads):
            with self._console.status(f"{load}: drawing images"):
                before = self._plan.workload.requests(self._plan.warmup, 2 * number)
                measured = self._plan.workload.requests(self._plan.requests, 2 * number + 1)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                self._start(progress, f"{load}: warming up", before).closed(load.concurrency or 1)
                self._measure(load, self._start(progress, str(load), measured))

    def _start(self, progress: Progress, title: str, requests: Sequence[Request]) -> Run:
        task = progress.add_task(title, total=len(requests))
        return Run(self._target, requests, lambda _: progress.advance(task))

    def _measure(self, load: Load, run: Run) -> None:
        before = self._meter.read()
        server: Mapping[str, Any] = {}
        try:
            load.drive(run, self._plan.workload.seed)
            server = self._meter.read().since(before)
        finally:
            if run.records:
                figures = figures_of(run.records, self._plan.limits)
                setting = {**self._setting, "concurrency": load.concurrency, "request_rate": load.request_rate}
                self.results.append(Result(str(load), setting, figures, server))
