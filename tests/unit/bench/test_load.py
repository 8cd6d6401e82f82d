"""The closed and the open loop, against targets that answer when a test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from blipstream.bench.load import Record, Request, Run
from blipstream.errors import ClientError


class Slow:
    """Answers after so many seconds; notes how many requests were under way at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._running = 0
        self.most = 0
        self.prompts: list[str] = []

    def send(self, request: Request, on_tokens: Callable[[int], None]) -> None:
        with self._lock:
            self.prompts.append(request.prompt)
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(self._seconds)
        with self._lock:
            self._running -= 1
        if request.prompt == "refuse":
            raise ClientError("refused")
        on_tokens(request.output_tokens)

    def close(self) -> None:
        pass


def requests(count: int) -> list[Request]:
    return [Request(b"", str(number), 3) for number in range(count)]


def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    target, done = Slow(0.01), list[Record]()
    run = Run(target, requests(12), done.append)
    run.closed(3)
    assert target.most == 3
    assert sorted(map(int, target.prompts)) == list(range(12))
    assert len(done) == len(run.records) == 12
    assert all(record.tokens == 3 and record.done_at >= record.sent_at for record in run.records)


def test_an_open_loop_does_not_wait_for_the_server() -> None:
    """Ten requests at 200 a second to a server that takes far longer for one: they are all under way together."""
    target = Slow(0.5)
    run = Run(target, requests(10), lambda _: None)
    run.open(200.0, seed=1)
    assert target.most == 10


def test_arrivals_are_random_and_repeatable_and_count_from_when_they_were_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single thread, what a request waits for it is part of its time."""
    offsets = []
    for seed in (1, 1, 2):
        run = Run(Slow(), requests(50), lambda _: None)
        run.open(1000.0, seed)
        start = min(record.sent_at for record in run.records)
        offsets.append(sorted(round(record.sent_at - start, 6) for record in run.records))
    assert offsets[0] == offsets[1] != offsets[2]
    gaps = [b - a for a, b in zip(offsets[0], offsets[0][1:], strict=False)]
    assert 0.0005 < sum(gaps) / len(gaps) < 0.002
    assert max(gaps) > 2 * min(gaps)
    monkeypatch.setattr("blipstream.bench.load.MOST_OPEN", 1)
    run = Run(Slow(0.02), requests(10), lambda _: None)
    run.open(1000.0, seed=1)
    assert max(record.done_at - record.sent_at for record in run.records) > 0.1


def test_a_refusal_is_a_record_and_a_fault_of_the_target_is_not_swallowed() -> None:
    run = Run(Slow(), [Request(b"", "refuse", 1), *requests(1)], lambda _: None)
    run.closed(1)
    assert [record.error for record in run.records] == ["refused", ""]

    class Broken(Slow):
        def send(self, request: Request, on_tokens: Callable[[int], None]) -> None:
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        Run(Broken(), requests(3), lambda _: None).closed(2)


@pytest.mark.parametrize("drive", [lambda run: run.closed(1), lambda run: run.open(1e6, seed=1)])
def test_a_server_that_answers_nothing_any_more_is_not_asked_for_ever(
    drive: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blipstream.bench.load.MOST_OPEN", 1)
    refused = Request(b"", "refuse", 1)
    run = Run(Slow(), [*requests(3), *[refused] * 100], lambda _: None, patience=0)
    drive(run)
    assert (len(run.records), run.given_up) == (3 + 2, True)
    run = Run(Slow(), [*requests(2), refused] * 3, lambda _: None, patience=0)
    drive(run)
    assert (len(run.records), run.given_up) == (9, False)
