"""The command ``blipstream plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from blipstream.commands.requests import complain
from blipstream.errors import BlipstreamError, InvalidRequestError

if TYPE_CHECKING:
    from blipstream.planning.capacity import Answer
    from blipstream.planning.stages import StageTimes

_EXTRA = ("PIL", "numpy", "onnxruntime", "tokenizers")


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="Whose stages are measured here, in a minute or two.")
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests a second of the whole load.")] = 1.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="In ms: ttft:1000 or e2el:5000; may be repeated.", show_default="e2el:10000"),
    ] = None,
    percentile: Annotated[float, typer.Option(min=1, max=99.9, help="Of requests that keep to the limits.")] = 90.0,
    text_tokens: Annotated[str, typer.Option(help="Tokens of a question, MEAN or MEAN:STD.")] = "10",
    output_tokens: Annotated[str, typer.Option(help="Tokens of an answer, MEAN or MEAN:STD.")] = "20",
    requests: Annotated[int, typer.Option(min=20, help="Requests that are simulated.")] = 400,
    stages_file: Annotated[
        Path | None, typer.Option("--stages", help="Keep the measured times in this file; without BUNDLE, read them.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each engine; 0 means all cores.")] = 0,
) -> None:
    """Say how many machines like this one a load needs, by measured stages and a simulated server."""
    console = Console()
    try:
        from blipstream.bench.workload import Lengths
        from blipstream.planning.capacity import draw_questions
        from blipstream.planning.capacity import plan as simulate

        limits = _parse_limits(limit or ["e2el:10000"])
        if not 0 < request_rate < float("inf"):
            raise InvalidRequestError(f"a request rate must be above 0 a second, but it is {request_rate}")
        text, output = Lengths.parse(text_tokens, "text tokens"), Lengths.parse(output_tokens, "output tokens")
        stages = _stages(console, bundle, stages_file, threads)
        with console.status("simulating"):
            answer = simulate(stages, draw_questions(text, output, requests), request_rate, limits, percentile)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        complain("plan", f"{error.name} is not installed: `pip install 'blipstream[server,bench]'` brings it")
        raise typer.Exit(1) from None
    except (BlipstreamError, OSError) as error:
        complain("plan", str(error))
        raise typer.Exit(1) from None
    _show(console, stages, answer, request_rate, percentile, limits)
    if answer.machines is None:
        raise typer.Exit(1)


def _parse_limits(texts: list[str]) -> dict[str, float]:
    from blipstream.bench.figures import parse_limits
    from blipstream.planning.capacity import LIMITED

    limits = parse_limits(texts)
    for name in limits:
        if name not in LIMITED:
            raise InvalidRequestError(f"a plan has limits of {' and '.join(LIMITED)}, but one is of {name}")
    return limits


def _stages(console: Console, bundle: Path | None, file: Path | None, threads: int) -> StageTimes:
    from blipstream.planning.stages import StageTimes

    if bundle is None:
        if file is None:
            raise InvalidRequestError("give a bundle, whose stages are measured, or --stages with a file of such times")
        return StageTimes.load(file)
    from blipstream.planning.measure import measure_stages

    with console.status("loading") as status:
        stages = measure_stages(
            bundle, threads=threads or None, on_stage=lambda stage: status.update(f"measuring {stage}")
        )
    if file is not None:
        stages.save(file)
    return stages


def _show(
    console: Console, stages: StageTimes, answer: Answer, rate: float, percentile: float, limits: dict[str, float]
) -> None:
    table = Table(title="stages of this machine, in milliseconds")
    for column in ("stage", *("at once", "time") * 2):
        table.add_column(column, justify="right")
    rows = (("images", stages.images), ("prefill, tokens", stages.prefill), ("step, sequences", stages.step))
    for name, curve in rows:
        ends = (curve[0], curve[-1])
        table.add_row(name, *(text for amount, seconds in ends for text in (f"{amount:g}", f"{1000 * seconds:.1f}")))
    console.print(table)
    wanted = " and ".join(f"{name} of at most {limit:g} ms" for name, limit in limits.items())
    console.print(f"alone, a request takes {answer.alone:.2f} s; at most {answer.saturated:.3g} a second are answered")
    if answer.machines is None:
        console.print(f"no number of such machines gives {percentile:g} % of requests {wanted}", style="red")
        return
    console.print(f"with {wanted} for {percentile:g} % of requests, a machine takes {answer.capacity:.3g} a second")
    console.print(f"{rate:g} requests a second need {answer.machines} such machines", style="bold")
