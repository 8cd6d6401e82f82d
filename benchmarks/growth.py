"""How the cost of a request grows: with requests in flight, tokens of the prompt, and pixels of the image.

    python -m benchmarks.growth CHECKPOINT BUNDLE [--curves flight bulk known prompt image] [--max-in-flight 64]

A real server of the bundle for each curve, one after the other; each point after requests that are not counted. Rows
go to benchmarks/results/growth.csv, and beside it a plot of the curves of this checkpoint on this kind of machine.

- ``flight``: clients that always have a request under way, each for a caption of 20 tokens of an image of its own.
- ``bulk``: the same, from a server that reads images before it decodes (``blipstream serve --decode-niceness 10``).
- ``known``: a short question about an image that the server has seen before, so that the decode loop is all that works.
- ``prompt``: a question of so many tokens about a known image, one at a time; an answer of one token.
- ``image``: a JPEG file of so many pixels, decoded and made the pixels of the ViT (``preprocess``), one at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.fullsize.questions import QUESTIONS
from benchmarks.rows import Setting, append_rows, read_rows
from benchmarks.run import RESULTS
from benchmarks.setting import make_setting
from blipstream.bench.figures import figures_of
from blipstream.bench.kserve import KServe
from blipstream.bench.load import Request, Run
from blipstream.bench.meter import Meter
from blipstream.bench.workload import Lengths, Sizes, Workload, render
from blipstream.config import ServerConfig
from blipstream.contract import IMAGE, PREPROCESS
from blipstream.triton.server import TritonServer

FILE = "growth.csv"
FLIGHT = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500)
SIDES = ((100, 75), (320, 240), (640, 480), (1280, 960), (2048, 1536), (4096, 3072), (8192, 6144))
ANSWER_TOKENS = 20
_PICTURES = Sizes((320, 240), (1024, 768))
_TIMES = 5
"""Of each point of the curves that go one at a time."""
_TIMEOUT_S = 3600.0
_BULK_NICENESS = 10


@dataclass(frozen=True)
class GrowthRow(Setting):
    """One point of a curve."""

    curve: str
    value: float
    """Clients, tokens, or millions of pixels."""
    requests: int
    p50_ms: float
    p90_ms: float
    request_throughput: float
    output_throughput: float
    engine_share: float
    """Share of the time in which the decode loop was in its engine; NaN where it is not asked."""


@dataclass(frozen=True)
class Point:
    """What one point of a curve came to; see :class:`GrowthRow`."""

    value: float
    requests: int
    p50_ms: float
    p90_ms: float
    request_throughput: float = float("nan")
    output_throughput: float = float("nan")
    engine_share: float = float("nan")


class Curves:
    """The curves of one server.

    Args:
        server: that is asked.
        most: clients at most.
        longest: tokens of a prompt at most.
        fewest: requests of a point of the curves with several clients, at least.
    """

    def __init__(self, server: TritonServer, most: int, longest: int, fewest: int) -> None:
        self._target = KServe(server.grpc_url, None, timeout=_TIMEOUT_S)
        self._meter = Meter(server.grpc_url, server.metrics_url)
        self._url = server.grpc_url
        self._most = most
        self._longest = longest
        self._fewest = fewest

    def flight(self) -> Iterator[Point]:
        """See above."""
        return self._in_flight(images=None, seed=1)

    bulk = flight

    def known(self) -> Iterator[Point]:
        """See above."""
        return self._in_flight(images=2, seed=2)

    def prompt(self) -> Iterator[Point]:
        """See above; a byte is a token in a random checkpoint, a word about one in others."""
        image = render(np.random.default_rng(3), (640, 480))
        self._send([Request(image, "a", 1)], 1)
        for tokens in (tokens for tokens in PROMPTS if tokens <= self._longest):
            prompts = [Request(image, "abcde"[number] * tokens, 1) for number in range(_TIMES)]
            yield _single(tokens, [lambda r=request: self._send([r], 1) for request in prompts])  # type: ignore[misc]

    def image(self) -> Iterator[Point]:
        """See above."""
        with triton.InferenceServerClient(self._url) as client:
            for width, height in SIDES:
                file = np.array([[render(np.random.default_rng(4), (width, height))]], np.object_)
                tensor = triton.InferInput(IMAGE.name, [1, 1], "BYTES")
                tensor.set_data_from_numpy(file)
                client.infer(PREPROCESS, [tensor])
                yield _single(width * height / 1e6, [lambda t=tensor: client.infer(PREPROCESS, [t])] * _TIMES)  # type: ignore[misc]

    def close(self) -> None:
        """Close the connection."""
        self._target.close()

    def _in_flight(self, images: int | None, seed: int) -> Iterator[Point]:
        for part, clients in enumerate(count for count in FLIGHT if count <= self._most):
            count = max(self._fewest, 2 * clients)
            workload = Workload(images or count, _PICTURES, None, Lengths(ANSWER_TOKENS), seed)
            # images that the server is to know are those of every point
            requests = workload.requests(count, 0 if images else part + 1)
            if images:
                requests = [replace(request, prompt=QUESTIONS[i % 2]) for i, request in enumerate(requests)]
            self._send(requests[:2] if images else workload.requests(2, 0), 1)
            before = self._meter.read()
            run = self._send(requests, clients)
            figures = figures_of(run.records)
            counters = self._meter.read().since(before)["counters"]
            engine = counters["prefill_seconds"] + counters["decode_seconds"]
            yield Point(
                clients,
                count,
                figures.latencies["p50_e2el_ms"],
                figures.latencies["p90_e2el_ms"],
                figures.request_throughput,
                figures.output_throughput,
                engine / figures.duration,
            )

    def _send(self, requests: Sequence[Request], clients: int) -> Run:
        run = Run(self._target, requests, lambda _: None)
        run.closed(clients)
        errors = [record.error for record in run.records if record.error]
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(requests)} requests failed, the first: {errors[0]}")
        return run


def _single(value: float, calls: Sequence[Callable[[], object]]) -> Point:
    taken = []
    for call in calls:
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return Point(value, len(calls), statistics.median(taken), float(np.percentile(taken, 90)))


CURVES = ("flight", "bulk", "known", "prompt", "image")
_TITLES = {
    "flight": ("clients, each image new", "requests per second"),
    "bulk": ("clients, each image new, images first", "requests per second"),
    "known": ("clients, images known", "requests per second"),
    "prompt": ("tokens of the prompt", "ms"),
    "image": ("millions of pixels", "ms"),
}


def draw(rows: Sequence[GrowthRow], path: Path) -> None:
    """Draw curves as a PNG file, each of the run that has most of its points, the last of those."""
    points = Counter((row.curve, row.date) for row in rows)
    chosen = {curve: date for (curve, date), _ in sorted(points.items(), key=lambda item: (item[1], item[0][1]))}
    names = [name for name in CURVES if name in chosen]
    figure = Figure(figsize=(4 * len(names), 3.6), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if (row.curve, row.date) == (name, chosen[name])]
        label, unit = _TITLES[name]
        values = [row.request_throughput if unit != "ms" else row.p50_ms for row in own]
        axes.plot([row.value for row in own], values, "o-", color="#0072b2", markersize=4)
        axes.set_xlabel(label)
        axes.set_title(unit, fontsize=9)
        if name != "prompt":
            axes.set_xscale("log", base=10 if name == "image" else 2)  # pixels span too much for 2
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(rows[-1].title, fontsize=9)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write rows and the plot."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    command, load = shlex.join(["python", "-m", "benchmarks.growth", *arguments]), os.getloadavg()[0]
    console = Console()
    setting = None
    for name in options.curves:
        config = ServerConfig(request_timeout=_TIMEOUT_S, decode_niceness=_BULK_NICENESS if name == "bulk" else 0)
        with (
            TritonServer(options.bundle, config=config) as server,
            closing(Curves(server, options.max_in_flight, options.max_prompt, options.requests)) as curves,
        ):
            threads = len(os.sched_getaffinity(0))
            setting = setting or make_setting(server, options.checkpoint, threads, command, load)
            for point in getattr(curves, name)():
                figures = {key: round(value, 4) for key, value in dataclasses.asdict(point).items()}
                row = GrowthRow(**dataclasses.asdict(setting), curve=name, **figures)
                append_rows(options.results / FILE, [row])
                console.print(" ".join([name, *(f"{key} {value:g}" for key, value in figures.items())]))
    assert setting is not None  # the parser wants a curve at least
    alike = [row for row in read_rows(options.results / FILE, GrowthRow) if row.is_like(setting)]
    draw(alike, options.results / f"growth-{setting.checkpoint_name}.png")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description="How the cost of a request grows.")
    parser.add_argument("checkpoint", type=Path, help="for its name")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--curves", nargs="+", default=CURVES, choices=CURVES)
    parser.add_argument("--max-in-flight", type=int, default=FLIGHT[-1])
    parser.add_argument(
        "--max-prompt", type=int, default=PROMPTS[-1], help="tokens; soft tokens and answer come on top"
    )
    parser.add_argument("--requests", type=int, default=8, help="of each number of clients, at least")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
