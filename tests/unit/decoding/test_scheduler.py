"""The scheduling policy, with plain integers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from blipstream.decoding.scheduler import Scheduler
from blipstream.errors import ServerBusyError


@dataclass(eq=False)
class Job:
    num_prompt_tokens: int = 10
    arrived_at: float = 0.0
    start_by: float | None = None
    cancelled: bool = False


def scheduler_of(jobs, max_waiting=100, prefill_budget=100):
    scheduler = Scheduler(max_waiting, prefill_budget)
    for job in jobs:
        scheduler.add(job)
    return scheduler


def test_first_come_first_served():
    jobs = [Job() for _ in range(5)]
    scheduler = scheduler_of(jobs)
    assert scheduler.schedule(2, 0.0).admitted == jobs[:2]
    assert scheduler.schedule(2, 0.0).admitted == jobs[2:4]
    assert scheduler.waiting == (jobs[4],)


def test_no_slot_no_admission():
    scheduler = scheduler_of([Job()])
    assert scheduler.schedule(0, 0.0).admitted == []
    assert len(scheduler) == 1


def test_the_budget_counts_padding():
    jobs = [Job(20), Job(50), Job(1)]
    scheduler = scheduler_of(jobs, prefill_budget=100)
    assert scheduler.schedule(8, 0.0).admitted == jobs[:2]  # 2 x 50 tokens; 3 x 50 would be too many
    assert scheduler.schedule(8, 0.0).admitted == jobs[2:]


def test_nobody_overtakes_a_prompt_that_does_not_fit_the_budget():
    jobs = [Job(60), Job(60), Job(1)]
    scheduler = scheduler_of(jobs, prefill_budget=100)
    assert scheduler.schedule(8, 0.0).admitted == jobs[:1]
    assert scheduler.schedule(8, 0.0).admitted == jobs[1:2]


def test_a_prompt_longer_than_the_budget_is_admitted_alone():
    jobs = [Job(500), Job(1)]
    scheduler = scheduler_of(jobs, prefill_budget=100)
    assert scheduler.schedule(8, 0.0).admitted == jobs[:1]


def test_a_full_queue_refuses():
    scheduler = scheduler_of([Job(), Job()], max_waiting=2)
    with pytest.raises(ServerBusyError, match="the queue is full: 2 requests are waiting for a slot"):
        scheduler.add(Job())
    scheduler.schedule(1, 0.0)
    scheduler.add(Job())


def test_cancelled_ones_leave_even_without_a_slot():
    jobs = [Job(), Job(cancelled=True), Job()]
    scheduler = scheduler_of(jobs)
    decision = scheduler.schedule(0, 0.0)
    assert decision.cancelled == [jobs[1]]
    assert scheduler.waiting == (jobs[0], jobs[2])


def test_who_waited_too_long_is_told_so():
    jobs = [Job(arrived_at=1.0, start_by=3.5), Job(arrived_at=1.0, start_by=5.0), Job()]
    scheduler = scheduler_of(jobs)
    assert scheduler.schedule(0, 3.5).expired == []
    ((expired, error),) = scheduler.schedule(0, 4.0).expired
    assert expired is jobs[0]
    assert str(error) == "the request waited 3.000 s for a slot, and its timeout is 2.500 s"
    assert scheduler.waiting == tuple(jobs[1:])


def test_cancelled_and_expired_counts_once_as_cancelled():
    job = Job(start_by=1.0, cancelled=True)
    decision = scheduler_of([job]).schedule(4, 2.0)
    assert (decision.cancelled, decision.expired, decision.admitted) == ([job], [], [])


def test_imports_neither_an_engine_nor_numpy():
    code = "import sys, blipstream.decoding.scheduler; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "onnxruntime", "tokenizers", "blipstream.engines"} & set(modules)
