"""The command ``blipstream bench``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from blipstream.commands.requests import complain
from blipstream.errors import BlipstreamError, InvalidRequestError

if TYPE_CHECKING:
    from blipstream.bench.load import Target
    from blipstream.bench.report import Result

_DEFAULT_URL = "localhost:8001"
_EXTRA = ("PIL", "grpc", "tritonclient", "google")
_TABLE_WIDTH = 130
_INTERRUPTED = 130
"""Exit status of what Ctrl-C has ended, as shells have it."""


def bench(
    url: Annotated[
        str, typer.Option(envvar="BLIPSTREAM_URL", metavar="URL", help="HOST:PORT of gRPC, or http://HOST:PORT.")
    ] = _DEFAULT_URL,
    protocol: Annotated[str, typer.Option(help="kserve (gRPC) or openai (chat completions over HTTP).")] = "kserve",
    model: Annotated[str | None, typer.Option(help="The model's name.", show_default="blip2 (kserve)")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Clients that always have a request under way; may be repeated.")
    ] = None,
    request_rate: Annotated[
        list[float] | None,
        typer.Option(help="Arrivals a second, at random moments, whatever the server does; may be repeated."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests that are measured, of each load.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before them, about other images.")] = 4,
    images: Annotated[
        int | None, typer.Option(min=1, help="Different images.", show_default="one for each request")
    ] = None,
    image_size: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT, or the smallest and the largest: 320x240-1920x1080.")
    ] = "640x480",
    prompt_words: Annotated[
        str | None, typer.Option(help="Words of a question, MEAN or MEAN:STD.", show_default="captions")
    ] = None,
    output_tokens: Annotated[str, typer.Option(help="Tokens of an answer, MEAN or MEAN:STD.")] = "20",
    goodput: Annotated[
        list[str] | None, typer.Option(help="A limit in ms: ttft:500, tpot:50 or e2el:2000; may be repeated.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of images, prompts, lengths and arrivals.", show_default="another one each time"),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 120.0,
    metrics_url: Annotated[
        str | None, typer.Option(help="Metrics of a Blipstream server: http://HOST:8002/metrics.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Append a row for each load to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw latency against throughput: a PNG.")] = None,
) -> None:
    """Put a server under load and measure what its clients see."""
    console = Console()
    if seed is None:  # the same images again would come from the server's caches
        seed = time.time_ns() % 2**32
    setting = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "url": url,
        "protocol": protocol,
        "model": model or "",
        "images": images or requests,
        "image_size": image_size,
        "prompt_words": prompt_words or "",
        "output_tokens": output_tokens,
        "requests": requests,
        "seed": seed,
    }
    try:
        with _needing_extra():
            from blipstream.bench.figures import parse_limits
            from blipstream.bench.meter import Meter
            from blipstream.bench.runner import Plan, Runner, make_loads
            from blipstream.bench.workload import Lengths, Sizes, Workload

            words = None if prompt_words is None else Lengths.parse(prompt_words, "prompt words")
            answers = Lengths.parse(output_tokens, "output tokens")
            workload = Workload(images or requests, Sizes.parse(image_size), words, answers, seed)
            loads = make_loads(concurrency or (), request_rate or ())
            plan = Plan(workload, loads, requests, warmup, parse_limits(goodput or ()))
            meter = Meter(url if protocol == "kserve" else None, metrics_url)
            with closing(_target(protocol, url, model, timeout)) as target:
                runner = Runner(plan, target, meter, setting, console)
                interrupted = False
                try:
                    runner.run()
                except KeyboardInterrupt:
                    interrupted = True
                    console.print("interrupted: what follows is what was measured until then")
            if runner.results:
                _report(console, runner.results, json_file, csv_file, plot_file)
    except (BlipstreamError, OSError) as error:
        complain("bench", str(error))
        raise typer.Exit(1) from None
    if interrupted:
        raise typer.Exit(_INTERRUPTED)
    if not any(result.figures.completed for result in runner.results):
        raise typer.Exit(1)


def _target(protocol: str, url: str, model: str | None, timeout: float) -> Target:
    if protocol == "openai":
        from blipstream.bench.openai import OpenAI

        return OpenAI(url, model, timeout)
    if protocol != "kserve":
        raise InvalidRequestError(f"a protocol must be kserve or openai, but it is {protocol!r}")
    from blipstream.bench.kserve import KServe

    return KServe(url, model, timeout)


def _report(
    console: Console, results: Sequence[Result], json_file: Path | None, csv_file: Path | None, plot_file: Path | None
) -> None:
    from blipstream.bench.report import append_csv, draw, make_table, write_json

    Console(width=max(console.width, _TABLE_WIDTH)).print(make_table(results))
    for result in results:
        for message, times in result.figures.errors.items():
            console.print(f"{result.load}: {times} failed: {message}", style="red", highlight=False, markup=False)
    if json_file:
        write_json(json_file, results)
    if csv_file:
        append_csv(csv_file, results)
    if plot_file:
        draw(plot_file, results)


@contextmanager
def _needing_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise BlipstreamError(f"{error.name} is not installed: `pip install 'blipstream[bench]'` brings it") from None
