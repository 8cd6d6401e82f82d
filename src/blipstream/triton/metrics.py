"""What the server measures of itself, published on Triton's metrics port in Prometheus' format.

Publishing a number through the Python backend takes a fraction of a millisecond, so the serving threads only add to
plain numbers here, and a thread of its own publishes them a few times a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from blipstream.decoding.observer import LoopObserver, StepReport

_log = logging.getLogger(__name__)

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Upper bounds, in seconds, of the histograms' buckets."""

OUTCOMES = ("eos", "length", "stop", "cancelled", "timeout", "busy", "invalid", "error")
"""How a request may end: a finish reason, or the kind of its error."""

COUNTERS = {
    "feature_cache_hits_total": "Images of requests whose soft tokens were kept, or already being computed",
    "feature_cache_misses_total": "Images of requests whose soft tokens had to be computed",
    "feature_cache_embeds_hits_total": "Misses for which the Q-Former alone ran, since the ViT had read the image for "
    "another instruction or was reading it",
    "prefix_cache_hits_total": "Prompts whose soft tokens the decoder had read before, so that it read the text alone",
    "generated_tokens_total": "Tokens generated",
    "prompt_tokens_total": "Prompt tokens prefilled, soft tokens included",
    "decode_steps_total": "Iterations of the decode loop",
    "prefill_seconds_total": "Seconds in which the decoder's engine read prompts",
    "decode_seconds_total": "Seconds in which the decoder's engine appended tokens",
}
GAUGES = {
    "feature_cache_bytes": "Bytes of image features in the cache",
    "prefix_cache_bytes": "Bytes of images' keys and values that the decoder keeps",
    "running_sequences": "Sequences that hold a slot",
    "waiting_requests": "Requests that wait for image features or for a slot",
    "tokens_per_second": "Tokens generated a second, over the last seconds",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "Time from a request's arrival to its first token",
    "request_seconds": "Time from a request's arrival to its last response",
    "queue_seconds": "Time from a request's arrival to its slot, image features included",
}
REQUESTS = ("requests_total", "Requests that have ended, by outcome")


class ServingMetrics(LoopObserver):
    """The numbers. Any thread may add to them; :meth:`take` hands over what has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._observations: dict[str, list[float]] = {name: [] for name in HISTOGRAMS}
        self._outcomes: Counter[str] = Counter()

    def on_step(self, report: StepReport) -> None:
        """Count an iteration of the decode loop."""
        with self._lock:
            self._counts["generated_tokens_total"] += report.generated_tokens
            self._counts["prompt_tokens_total"] += report.prefill_tokens
            self._counts["decode_steps_total"] += 1
            self._counts["prefill_seconds_total"] += report.prefill_seconds
            self._counts["decode_seconds_total"] += report.decode_seconds

    def on_start(self, queue_seconds: float) -> None:
        """Note how long a request waited for its slot."""
        self._observe("queue_seconds", queue_seconds)

    def on_first_token(self, seconds: float) -> None:
        """Note how long a request waited for its first token."""
        self._observe("time_to_first_token_seconds", seconds)

    def on_outcome(self, outcome: str, seconds: float) -> None:
        """Count a request that has ended, by one of :data:`OUTCOMES`, and note how long it took."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._observations["request_seconds"].append(seconds)

    def take(self) -> tuple[Mapping[str, float], Mapping[str, Sequence[float]], Mapping[str, int]]:
        """What was counted, observed and ended since the last call."""
        with self._lock:
            taken = (self._counts, self._observations, self._outcomes)
            self._counts, self._outcomes = defaultdict(float), Counter()
            self._observations = {name: [] for name in HISTOGRAMS}
        return taken

    def _observe(self, name: str, value: float) -> None:
        with self._lock:
            self._observations[name].append(value)


class Rate:
    """Events a second over a sliding window.

    Args:
        window: its length in seconds.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, count: int, now: float) -> float:
        """Add the events since the last call; return the rate."""
        self._counts.append((now, count))
        while now - self._counts[0][0] > self._window:
            self._counts.popleft()
        return sum(count for _, count in self._counts) / self._window


class Family(Protocol):
    """Makes the metrics of one name, as ``MetricFamily`` of the Python backend does."""

    def Metric(self, *, labels: Mapping[str, str], buckets: Sequence[float] | None = None) -> Any:  # noqa: N802
        """A metric with ``increment``, ``set`` and ``observe``."""
        ...


class MetricsPublisher:
    """The thread that publishes.

    Args:
        metrics: what is counted and observed.
        gauges: reads the gauges and the running totals that others keep (the cache's hits and misses).
        make_family: makes a family by name, description and kind (``COUNTER``, ``GAUGE``, ``HISTOGRAM``).
        labels: labels of every metric.
        interval: seconds between two publications.
    """

    def __init__(
        self,
        metrics: ServingMetrics,
        gauges: Callable[[], Mapping[str, float]],
        make_family: Callable[[str, str, str], Family],
        labels: Mapping[str, str],
        interval: float = 0.25,
    ) -> None:
        self._metrics = metrics
        self._gauges = gauges
        self._interval = interval
        self._families: list[Family] = []
        self._by_name: dict[str, Any] = {}
        self._totals: Counter[str] = Counter()
        self._rate = Rate(window=5.0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-publisher", daemon=True)
        for kind, names in (("COUNTER", COUNTERS), ("GAUGE", GAUGES), ("HISTOGRAM", HISTOGRAMS)):
            for name, text in names.items():
                family = self._family(make_family, name, text, kind)
                buckets = {"buckets": list(LATENCY_BUCKETS)} if kind == "HISTOGRAM" else {}
                self._by_name[name] = family.Metric(labels=labels, **buckets)
        family = self._family(make_family, *REQUESTS, "COUNTER")
        self._by_outcome = {name: family.Metric(labels={**labels, "outcome": name}) for name in OUTCOMES}

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def close(self) -> None:
        """Publish once more, then stop and free the metrics, each before its family, while the server still runs."""
        self._stopping.set()
        self._thread.join()
        self._by_name.clear()
        self._by_outcome.clear()
        self._families.clear()

    def publish(self) -> None:
        """Publish what has changed."""
        counts, observations, outcomes = self._metrics.take()
        readings = self._gauges()
        for name, count in counts.items():
            self._by_name[name].increment(count)
        for name, values in observations.items():
            for value in values:
                self._by_name[name].observe(value)
        for outcome, count in outcomes.items():
            self._by_outcome[outcome].increment(count)
        for name, value in readings.items():
            if name in COUNTERS:
                self._by_name[name].increment(value - self._totals[name])
                self._totals[name] = int(value)
            else:
                self._by_name[name].set(value)
        rate = self._rate.add(int(counts.get("generated_tokens_total", 0)), time.monotonic())
        self._by_name["tokens_per_second"].set(rate)

    def _family(self, make_family: Callable[[str, str, str], Family], name: str, text: str, kind: str) -> Family:
        family = make_family(f"blipstream_{name}", text, kind)
        self._families.append(family)  # the Python backend drops the metrics of a family that nobody holds
        return family

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            self._publish_guarded()
        self._publish_guarded()

    def _publish_guarded(self) -> None:
        try:
            self.publish()
        except Exception:
            _log.exception("the metrics could not be published")


def triton_family(name: str, description: str, kind: str) -> Family:
    """A family of the Python backend, published on Triton's metrics port."""
    import triton_python_backend_utils as pb_utils

    kinds = pb_utils.MetricFamily
    family: Family = kinds(name=name, description=description, kind=getattr(kinds, kind))
    return family
