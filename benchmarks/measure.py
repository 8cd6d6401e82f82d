"""Measuring: round after round, each load on each system in turn, so that what slows the machine slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import workload
from benchmarks.harness import Request, System, figures_of, run_closed_loop, share_equal
from benchmarks.rows import Load, Round

CONCURRENCIES = (1, 4, 16)
_WARM_UP = 2
"""Requests of each client before the first round of a load, about scenes that are not measured."""

Rounds = dict[Load, dict[str, list[Round]]]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    requests: int
    """Of each round of each load."""
    rounds: int

    @property
    def loads(self) -> tuple[Load, ...]:
        """Distinct images at each concurrency, and repeated ones at the highest."""
        distinct = [Load(workload.DISTINCT, concurrency, self.requests) for concurrency in CONCURRENCIES]
        return (*distinct, Load(workload.REPEATED, CONCURRENCIES[-1], self.requests))


def measure(systems: Sequence[System], reference: str, plan: Plan, on_progress: Callable[[str, int], None]) -> Rounds:
    """Run the plan. The answers of the system named ``reference`` are those that all are compared with.

    ``on_progress`` is called with what is being measured, and with 1 whenever one system is done with one round.
    """
    rounds: Rounds = {load: {system.name: [] for system in systems} for load in plan.loads}
    first_scene = 0
    for number in range(plan.rounds):
        first = number % len(systems)  # another system begins in each round
        turn = [*systems[first:], *systems[:first]]
        for load in plan.loads:
            if number == 0:
                _warm_up(systems, load.concurrency)
            requests = _requests(load, first_scene)
            first_scene += plan.requests  # no two loads share an image
            records = {}
            for system in turn:
                on_progress(f"round {number + 1}: {load.workload}, {load.concurrency} clients, {system.name}", 0)
                records[system.name] = run_closed_loop(system, requests, load.concurrency)
                on_progress("", 1)
            for name, own in records.items():
                rounds[load][name].append(Round(figures_of(own), share_equal(own, records[reference])))
    return rounds


def _requests(load: Load, first_scene: int) -> list[Request]:
    make = workload.distinct if load.workload == workload.DISTINCT else workload.repeated
    return make("test", first_scene, load.requests)


def _warm_up(systems: Sequence[System], concurrency: int) -> None:
    requests = workload.distinct("val", 0, _WARM_UP * concurrency)
    for system in systems:
        run_closed_loop(system, requests, concurrency)
