"""The command ``blipstream bench``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from blipstream.commands.options import with_options
from blipstream.commands.requests import complain
from blipstream.errors import BlipstreamError, InvalidRequestError

if TYPE_CHECKING:
    from blipstream.bench.load import Target
    from blipstream.bench.report import Result
    from blipstream.bench.runner import Plan, Runner

_DEFAULT_URL = "localhost:8001"
_EXTRA = ("PIL", "grpc", "tritonclient", "google")
_TABLE_WIDTH = 130
_INTERRUPTED = 130
"""Exit status of what Ctrl-C has ended, as shells have it."""


@dataclass(frozen=True)
class BenchOptions:
    """What the command line says."""

    url: Annotated[
        str, typer.Option(envvar="BLIPSTREAM_URL", metavar="URL", help="HOST:PORT of gRPC, or http://HOST:PORT.")
    ] = _DEFAULT_URL
    protocol: Annotated[str, typer.Option(help="kserve (gRPC) or openai (chat completions over HTTP).")] = "kserve"
    model: Annotated[str | None, typer.Option(help="The model's name.", show_default="blip2 (kserve)")] = None
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Clients that always have a request under way; may be repeated.")
    ] = None
    request_rate: Annotated[
        list[float] | None,
        typer.Option(help="Arrivals a second, at random moments, whatever the server does; may be repeated."),
    ] = None
    requests: Annotated[int, typer.Option(min=1, help="Requests that are measured, of each load.")] = 64
    warmup: Annotated[int, typer.Option(min=0, help="Requests before them, about other images.")] = 4
    images: Annotated[
        int | None, typer.Option(min=1, help="Different images.", show_default="one for each request")
    ] = None
    image_size: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT, or the smallest and the largest: 320x240-1920x1080.")
    ] = "640x480"
    prompt_words: Annotated[
        str | None, typer.Option(help="Words of a question, MEAN or MEAN:STD.", show_default="captions")
    ] = None
    output_tokens: Annotated[str, typer.Option(help="Tokens of an answer, MEAN or MEAN:STD.")] = "20"
    goodput: Annotated[
        list[str] | None, typer.Option(help="A limit in ms: ttft:500, tpot:50 or e2el:2000; may be repeated.")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of images, prompts, lengths and arrivals.", show_default="another one each time"),
    ] = None
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 120.0
    metrics_url: Annotated[
        str | None, typer.Option(help="Metrics of a Blipstream server: http://HOST:8002/metrics.")
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Append a row for each load to this file.")] = None
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw latency against throughput: a PNG.")] = None

    @property
    def different_images(self) -> int:
        """Images of a load."""
        return self.images or self.requests

    def setting(self, seed: int) -> dict[str, Any]:
        """Columns that come first in each row."""
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "url": self.url,
            "protocol": self.protocol,
            "model": self.model or "",
            "images": self.different_images,
            "image_size": self.image_size,
            "prompt_words": self.prompt_words or "",
            "output_tokens": self.output_tokens,
            "requests": self.requests,
            "seed": seed,
        }


@with_options(BenchOptions)
def bench(*, options: BenchOptions) -> None:
    """Put a server under load and measure what its clients see."""
    console = Console()
    try:
        with _needing_extra():
            runner, interrupted = _run(options, console)
            if runner.results:
                _report(console, runner.results, options)
    except (BlipstreamError, OSError) as error:
        complain("bench", str(error))
        raise typer.Exit(1) from None
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    if not any(result.figures.completed for result in runner.results):
        raise typer.Exit(1)


def _run(options: BenchOptions, console: Console) -> tuple[Runner, bool]:
    """Run all loads; also whether Ctrl-C ended them."""
    from blipstream.bench.meter import Meter
    from blipstream.bench.runner import Runner

    # without a seed another one each time: the same images again would come from the server's caches
    seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    plan = _plan(options, seed)
    meter = Meter(options.url if options.protocol == "kserve" else None, options.metrics_url)
    with closing(_target(options)) as target:
        runner = Runner(plan, target, meter, options.setting(seed), console)
        try:
            runner.run()
        except KeyboardInterrupt:
            console.print("interrupted: what follows is what was measured until then")
            return runner, True
    return runner, False


def _plan(options: BenchOptions, seed: int) -> Plan:
    from blipstream.bench.figures import parse_limits
    from blipstream.bench.runner import Plan, make_loads
    from blipstream.bench.workload import Lengths, Sizes, Workload

    words = None if options.prompt_words is None else Lengths.parse(options.prompt_words, "prompt words")
    answers = Lengths.parse(options.output_tokens, "output tokens")
    workload = Workload(options.different_images, Sizes.parse(options.image_size), words, answers, seed)
    loads = make_loads(options.concurrency or (), options.request_rate or ())
    return Plan(workload, loads, options.requests, options.warmup, parse_limits(options.goodput or ()))


def _target(options: BenchOptions) -> Target:
    if options.protocol == "openai":
        from blipstream.bench.openai import OpenAI

        return OpenAI(options.url, options.model, options.timeout)
    if options.protocol != "kserve":
        raise InvalidRequestError(f"a protocol must be kserve or openai, but it is {options.protocol!r}")
    from blipstream.bench.kserve import KServe

    return KServe(options.url, options.model, options.timeout)


def _report(console: Console, results: Sequence[Result], options: BenchOptions) -> None:
    from blipstream.bench.report import append_csv, draw, make_table, write_json

    Console(width=max(console.width, _TABLE_WIDTH)).print(make_table(results))
    for result in results:
        for message, times in result.figures.errors.items():
            console.print(f"{result.load}: {times} failed: {message}", style="red", highlight=False, markup=False)
    if options.json_file:
        write_json(options.json_file, results)
    if options.csv_file:
        append_csv(options.csv_file, results)
    if options.plot_file:
        draw(options.plot_file, results)


@contextmanager
def _needing_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise BlipstreamError(f"{error.name} is not installed: `pip install 'blipstream[bench]'` brings it") from None
