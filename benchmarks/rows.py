"""The rows: one for each system, load and concurrency of a run, appended to a CSV file of the repository."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.harness import Figures


@dataclass(frozen=True)
class Setting:
    """When, where and with what a run was made; the same in all its rows."""

    date: str
    """ISO 8601, UTC; names the run."""
    device: str
    cores: int
    threads: int
    """Threads that torch was given, and each engine of the server."""
    load_average: float
    """Programs that wanted a core over the minute before the run began; well below 1 on a quiet machine."""
    blipstream: str
    tritonserver: str
    onnxruntime: str
    torch: str
    transformers: str
    checkpoint: str
    command: str

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint, as names of files have it."""
        return self.checkpoint.replace("/", "-")

    @property
    def title(self) -> str:
        """What a plot of the run says of it."""
        return f"{self.checkpoint}; {self.device}, {self.cores} cores; {self.date}"

    def is_like(self, other: Setting) -> bool:
        """Whether both are of the same checkpoint on the same kind of machine."""
        return (self.checkpoint, self.device, self.cores) == (other.checkpoint, other.device, other.cores)


R = TypeVar("R", bound=Setting)
_TYPES: Mapping[str, Callable[[str], object]] = {"int": int, "float": float, "str": str, "bool": "True".__eq__}
"""By their annotations, which are strings here."""


@dataclass(frozen=True)
class Row(Setting):
    """Medians over the rounds of a run; the figures are named as AIPerf and vLLM's benchmark name them."""

    workload: str
    """``distinct`` or ``repeated`` images."""
    system: str
    concurrency: int
    """Clients that always have a request under way."""
    requests: int
    """Requests of each round."""
    rounds: int
    request_throughput: float
    """Answered requests per second."""
    request_throughput_min: float
    """Of the slowest round."""
    request_throughput_max: float
    """Of the fastest round."""
    output_token_throughput: float
    """Generated tokens per second, end tokens included."""
    time_to_first_token_p50_ms: float
    time_to_first_token_p95_ms: float
    inter_token_latency_p50_ms: float
    inter_token_latency_p95_ms: float
    request_latency_p50_ms: float
    request_latency_p95_ms: float
    request_throughput_ratio: float
    """Over that of the fastest peer in the same round; more is better."""
    time_to_first_token_p50_ratio: float
    """Over that of the peer that is best at it in the same round; less is better. So are the next."""
    request_latency_p50_ratio: float
    request_latency_p95_ratio: float
    outputs_equal: float
    """Share of all requests answered with the very tokens of ``generate`` on the request alone."""


@dataclass(frozen=True)
class Round:
    """One round of one system."""

    figures: Figures
    outputs_equal: float


@dataclass(frozen=True)
class Load:
    """What the clients do."""

    workload: str
    concurrency: int
    requests: int


def make_rows(setting: Setting, load: Load, rounds: Mapping[str, Sequence[Round]], peers: Sequence[str]) -> list[Row]:
    """Sum up the rounds of one load, by system; ``peers`` are those that ratios refer to."""
    return [_row(setting, load, system, rounds, peers) for system in rounds]


def _row(setting: Setting, load: Load, system: str, rounds: Mapping[str, Sequence[Round]], peers: Sequence[str]) -> Row:
    own = rounds[system]
    throughputs = [one.figures.request_throughput for one in own]

    def median(name: str) -> float:
        return round(statistics.median(getattr(one.figures, name) for one in own), 3)

    def ratio(name: str, best: Callable[[Iterable[float]], float]) -> float:
        of_rounds = [
            getattr(one.figures, name) / best(getattr(rounds[peer][number].figures, name) for peer in peers)
            for number, one in enumerate(own)
        ]
        return round(statistics.median(of_rounds), 3)

    return Row(
        **dataclasses.asdict(setting),
        **dataclasses.asdict(load),
        system=system,
        rounds=len(own),
        request_throughput=median("request_throughput"),
        request_throughput_min=round(min(throughputs), 3),
        request_throughput_max=round(max(throughputs), 3),
        output_token_throughput=median("output_token_throughput"),
        time_to_first_token_p50_ms=median("time_to_first_token_p50"),
        time_to_first_token_p95_ms=median("time_to_first_token_p95"),
        inter_token_latency_p50_ms=median("inter_token_latency_p50"),
        inter_token_latency_p95_ms=median("inter_token_latency_p95"),
        request_latency_p50_ms=median("request_latency_p50"),
        request_latency_p95_ms=median("request_latency_p95"),
        request_throughput_ratio=ratio("request_throughput", max),
        time_to_first_token_p50_ratio=ratio("time_to_first_token_p50", min),
        request_latency_p50_ratio=ratio("request_latency_p50", min),
        request_latency_p95_ratio=ratio("request_latency_p95", min),
        outputs_equal=round(statistics.mean(one.outputs_equal for one in own), 4),
    )


def append_rows(path: Path, rows: Sequence[Setting]) -> None:
    """Append rows of one kind to a CSV file, which is made if it is missing.

    Raises:
        ValueError: the file has other columns than these rows.
    """
    columns = [field.name for field in dataclasses.fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        _check_columns(path, columns)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Read the rows of a CSV file.

    Raises:
        ValueError: the file has other columns than a row of this kind.
    """
    fields = dataclasses.fields(kind)
    _check_columns(path, [field.name for field in fields])
    with path.open(newline="", encoding="utf-8") as file:
        return [
            kind(**{field.name: _TYPES[str(field.type)](line[field.name]) for field in fields})
            for line in csv.DictReader(file)
        ]


def _check_columns(path: Path, columns: list[str]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != columns:
        differing = sorted(set(found) ^ set(columns)) or ["their order"]
        raise ValueError(f"{path} has other columns than the rows of this version, differing in {', '.join(differing)}")
