"""The command ``blipstream bench``."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from blipstream.commands.options import with_options
from blipstream.commands.requests import complain
from blipstream.errors import BlipstreamError, InvalidRequestError
from blipstream.extras import needing

if TYPE_CHECKING:
    from blipstream.bench.load import Target
    from blipstream.bench.runner import Plan, Runner

_DEFAULT_URL = "localhost:8001"
_MOST_CLIENTS = 1024
_MOST_SECONDS = 86400
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
        list[int] | None,
        typer.Option(min=1, max=_MOST_CLIENTS, help="Clients that always have a request under way; may be repeated."),
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; - is standard output.")
    ] = None
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Append a row for each load to this file; - is standard output.")
    ] = None
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw latency against throughput: a .png, .svg or .pdf.")
    ] = None

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
    try:
        with needing("bench"):
            status = _run(options)
    except BlipstreamError as error:
        complain("bench", str(error))
        status = 1
    except OSError as error:
        complain("bench", f"the results cannot be shown: {error.strerror or error}")
        status = 1
    if status:
        raise typer.Exit(status)


def _run(options: BenchOptions) -> int:
    """Run all loads and report what was measured, however they ended; the exit status."""
    from blipstream.bench.meter import Meter
    from blipstream.bench.outputs import Outputs
    from blipstream.bench.report import show
    from blipstream.bench.runner import Runner

    # without a seed another one each time: the same images again would come from the server's caches
    seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    plan, setting = _plan(options, seed), options.setting(seed)
    outputs = Outputs(options.json_file, options.csv_file, options.plot_file)
    outputs.check(Runner.columns(setting))
    meter = Meter(options.url if options.protocol == "kserve" else None, options.metrics_url)
    console = Console(stderr=outputs.to_stdout)
    with closing(_target(options)) as target:
        meter.read()  # a server that is not there is said before anything is drawn
        runner = Runner(plan, target, meter, setting, console)
        status = _ended(runner)
    if runner.results:
        show(console, runner.results)
        outputs.write(runner.results)
    return status or int(any(result.figures.failed for result in runner.results))


def _ended(runner: Runner) -> int:
    """Run the loads; the exit status."""
    try:
        runner.run()
    except KeyboardInterrupt:
        complain("bench", "interrupted: what follows is what was measured until then")
        return _INTERRUPTED
    except BlipstreamError as error:
        complain("bench", f"ended early, and what follows is what was measured until then: {error}")
        return 1
    return 0


def _plan(options: BenchOptions, seed: int) -> Plan:
    from blipstream.bench.figures import parse_limits
    from blipstream.bench.runner import Plan, make_loads
    from blipstream.bench.workload import Lengths, Sizes, Workload

    words = None if options.prompt_words is None else Lengths.parse(options.prompt_words, "prompt words")
    answers = Lengths.parse(options.output_tokens, "output tokens")
    workload = Workload(options.different_images, Sizes.parse(options.image_size), words, answers, seed)
    loads = make_loads(options.concurrency or (), options.request_rate or ())
    limits, patience = parse_limits(options.goodput or ()), options.timeout
    if not 0 < patience <= _MOST_SECONDS:
        raise InvalidRequestError(
            f"a timeout must be above 0 and at most {_MOST_SECONDS} seconds, but it is {patience}"
        )
    return Plan(workload, loads, options.requests, options.warmup, limits, patience)


def _target(options: BenchOptions) -> Target:
    if options.protocol == "openai":
        from blipstream.bench.openai import OpenAI

        return OpenAI(options.url, options.model, options.timeout)
    if options.protocol != "kserve":
        raise InvalidRequestError(f"a protocol must be kserve or openai, but it is {options.protocol!r}")
    from blipstream.bench.kserve import KServe

    return KServe(options.url, options.model, options.timeout)
