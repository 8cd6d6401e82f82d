"""The cancellation watch and the publisher of metrics."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from blipstream.decoding.observer import StepReport
from blipstream.triton.cancellation import CancellationWatch
from blipstream.triton.metrics import LATENCY_BUCKETS, MetricsPublisher, Rate, ServingMetrics


class Watched:
    def __init__(self, answers: Sequence[bool | Exception]) -> None:
        self.answers = list(answers)
        self.asked = threading.Semaphore(0)

    def is_cancelled(self) -> bool:
        self.asked.release()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_cancelled_call_is_reported_once() -> None:
    reported: list[Watched] = []
    watch = CancellationWatch(reported.append, interval=0.001)
    watch.start()
    call, other = Watched([False, False, True]), Watched([False])
    watch.add(call)
    watch.add(other)
    for _ in range(10):
        assert other.asked.acquire(timeout=60)
    watch.close()
    assert reported == [call]
    assert len(call.answers) == 1


def test_a_call_that_cannot_be_asked_does_not_stop_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    reported: list[Watched] = []
    done = threading.Event()

    def report(call: Watched) -> None:
        reported.append(call)
        done.set()

    watch = CancellationWatch(report, interval=0.001)
    watch.start()
    broken, call = Watched([RuntimeError("gone")]), Watched([False, True])
    watch.add(broken)
    watch.add(call)
    assert done.wait(60)
    watch.close()
    assert reported == [call]
    assert "could not be asked" in caplog.text


def test_a_discarded_call_is_asked_no_more() -> None:
    watch = CancellationWatch(lambda _: pytest.fail("it was not cancelled"), interval=0.001)
    call = Watched([False])
    watch.add(call)
    watch.discard(call)
    watch.start()
    assert not call.asked.acquire(timeout=0.05)
    watch.close()


# --- metrics ---------------------------------------------------------------------------------------------------------


class Metric:
    def __init__(self) -> None:
        self.value = 0.0
        self.observed: list[float] = []

    def increment(self, value: float) -> None:
        assert value >= 0
        self.value += value

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.observed.append(value)


class Registry:
    """Families as the Python backend has them."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, str], Metric] = {}
        self.buckets: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.families: weakref.WeakSet[Any] = weakref.WeakSet()

    def family(self, name: str, description: str, kind: str) -> Any:
        assert description
        self.kinds[name] = kind
        registry = self

        class Family:
            def Metric(self, *, labels: Mapping[str, str], buckets: Any = None) -> Metric:  # noqa: N802
                assert labels["model"] == "blip2"
                registry.buckets[name] = buckets
                return registry.metrics.setdefault((name, labels.get("outcome", "")), Metric())

        family = Family()
        registry.families.add(family)
        return family

    def __getitem__(self, name: str) -> Metric:
        return self.metrics[f"blipstream_{name}", ""]

    def outcome(self, name: str) -> float:
        return self.metrics["blipstream_requests_total", name].value


def test_what_is_counted_is_published() -> None:
    registry, metrics = Registry(), ServingMetrics()
    gauges = {"feature_cache_hits_total": 3, "feature_cache_bytes": 100, "running_sequences": 2}
    publisher = MetricsPublisher(metrics, lambda: gauges, registry.family, {"model": "blip2"})
    metrics.on_step(StepReport(generated_tokens=4, prefill_tokens=20, prefill_seconds=0.5))
    metrics.on_step(StepReport(generated_tokens=2, decode_seconds=0.25))
    metrics.on_start(0.25)
    metrics.on_first_token(0.5)
    for outcome, seconds in (("eos", 2.0), ("eos", 3.0), ("cancelled", 0.5)):
        metrics.on_outcome(outcome, seconds)
    publisher.publish()
    gauges.update(feature_cache_hits_total=7, feature_cache_bytes=50)
    publisher.publish()
    assert registry["generated_tokens_total"].value == 6
    assert registry["prompt_tokens_total"].value == 20
    assert registry["decode_steps_total"].value == 2
    assert (registry["prefill_seconds_total"].value, registry["decode_seconds_total"].value) == (0.5, 0.25)
    assert registry["feature_cache_hits_total"].value == 7
    assert registry["feature_cache_bytes"].value == 50
    assert registry["running_sequences"].value == 2
    assert registry["queue_seconds"].observed == [0.25]
    assert registry["time_to_first_token_seconds"].observed == [0.5]
    assert registry["request_seconds"].observed == [2.0, 3.0, 0.5]
    assert registry["tokens_per_second"].value > 0
    assert (registry.outcome("eos"), registry.outcome("cancelled"), registry.outcome("error")) == (2, 1, 0)
    assert registry.kinds["blipstream_queue_seconds"] == "HISTOGRAM"
    assert registry.kinds["blipstream_generated_tokens_total"] == "COUNTER"
    assert registry.kinds["blipstream_running_sequences"] == "GAUGE"
    assert registry.buckets["blipstream_queue_seconds"] == list(LATENCY_BUCKETS)


def test_the_publisher_publishes_a_last_time_when_it_is_closed() -> None:
    registry, metrics = Registry(), ServingMetrics()
    publisher = MetricsPublisher(metrics, dict, registry.family, {"model": "blip2"}, interval=1000)
    publisher.start()
    metrics.on_outcome("stop", 1.0)
    assert registry.families
    publisher.close()
    assert registry.outcome("stop") == 1
    gc.collect()
    assert not registry.families, "what is freed after the server has gone crashes the process"


def test_a_failure_to_publish_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    registry, failed = Registry(), threading.Event()

    def gauges() -> dict[str, float]:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("broken")
        return {"waiting_requests": 5}

    publisher = MetricsPublisher(ServingMetrics(), gauges, registry.family, {"model": "blip2"}, interval=0.001)
    publisher.start()
    assert failed.wait(60)
    publisher.close()
    assert registry["waiting_requests"].value == 5
    assert "could not be published" in caplog.text


def test_rate_over_a_window() -> None:
    rate = Rate(window=5.0)
    assert rate.add(10, now=100.0) == 2.0
    assert rate.add(20, now=103.0) == 6.0
    assert rate.add(0, now=106.0) == 4.0
    assert rate.add(0, now=120.0) == 0.0
