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

_BUSY_CORES = 0.25


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
    requests: Annotated[int, typer.Option(min=20, max=100_000, help="Requests that are simulated.")] = 400,
    stages_file: Annotated[
        Path | None, typer.Option("--stages", help="Keep the measured times in this file; without BUNDLE, read them.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of each engine; 0 means all cores.")] = 0,
) -> None:
    """Say how many machines like this one a load needs, by measured stages and a simulated server."""
    console = Console()
    try:
        from blipstream.bench.figures import parse_limits
        from blipstream.bench.runner import check_rate
        from blipstream.bench.workload import Lengths
        from blipstream.planning.capacity import LIMITED, draw_questions
        from blipstream.planning.capacity import plan as simulate

        limits = parse_limits(limit or ["e2el:10000"], LIMITED)
        check_rate(request_rate)
        text, output = Lengths.parse(text_tokens, "text tokens"), Lengths.parse(output_tokens, "output tokens")
        stages = _stages(console, bundle, stages_file, threads)
        questions, cut = draw_questions(text, output, requests, stages)
        with console.status("simulating"):
            answer, slowest, fastest = (
                simulate(stages.scaled(factor), questions, request_rate, limits, percentile)
                for factor in (1.0, stages.slowest, stages.fastest)
            )
    except BlipstreamError as error:
        complain("plan", str(error))
        raise typer.Exit(1) from None
    except OSError as error:
        complain("plan", f"{error.filename or 'the plan'}: {error.strerror or error}")
        raise typer.Exit(1) from None
    _show_stages(console, stages)
    if cut:
        console.print(f"{cut} of {requests} requests were cut to what the bundle has room for", style="yellow")
    _show(console, (answer, slowest, fastest), request_rate, percentile, limits)
    if answer.machines is None:
        raise typer.Exit(1)


def _stages(console: Console, bundle: Path | None, file: Path | None, threads: int) -> StageTimes:
    from blipstream.planning.stages import StageTimes

    if bundle is None:
        if file is None:
            raise InvalidRequestError("give a bundle, whose stages are measured, or --stages with a file of such times")
        return StageTimes.load(file)
    from blipstream.bench.outputs import check_file
    from blipstream.planning.measure import measure_stages

    if file is not None:
        check_file(file)
    with console.status("loading") as status:
        stages = measure_stages(
            bundle, threads=threads or None, on_stage=lambda stage: status.update(f"measuring {stage}")
        )
    if file is not None:
        stages.save(file)
    return stages


def _show_stages(console: Console, stages: StageTimes) -> None:
    table = Table(title="stages of this machine, in milliseconds")
    for column in ("stage", *("at once", "time") * 2):
        table.add_column(column, justify="right")
    rows = (("images", stages.images), ("prefill, tokens", stages.prefill), ("step, sequences", stages.step))
    for name, curve in rows:
        ends = (curve[0], curve[-1])
        table.add_row(name, *(text for amount, seconds in ends for text in (f"{amount:.0f}", f"{1000 * seconds:.1f}")))
    console.print(table)
    spread = f"{1 - stages.fastest:.0%} shorter to {stages.slowest - 1:.0%} longer"
    console.print(f"repeated measurements were {spread} than these medians")
    if stages.others > _BUSY_CORES:
        busy = f"other programs kept {stages.others:.1f} cores busy meanwhile"
        console.print(f"{busy}: measure again on an idle machine", style="yellow")


def _show(
    console: Console, answers: tuple[Answer, Answer, Answer], rate: float, percentile: float, limits: dict[str, float]
) -> None:
    """Show what the medians say, and in brackets what the slowest and the fastest measurements do."""
    from blipstream.bench.figures import plain

    answer, slowest, fastest = answers
    wanted = " and ".join(f"{name} of at most {plain(limit)} ms" for name, limit in limits.items())
    console.print(
        f"alone, a request takes {answer.alone:.2f} s; at most {plain(answer.saturated)} a second are answered"
    )
    if answer.machines is None:
        console.print(f"no number of such machines gives {percentile:g} % of requests {wanted}", style="red")
        return
    takes = (
        f"a machine takes {plain(answer.capacity)} ({plain(slowest.capacity)} to {plain(fastest.capacity)}) a second"
    )
    console.print(f"with {wanted} for {percentile:g} % of requests, {takes}")
    spread = f"{fastest.machines} to {slowest.machines or 'any number, which is not enough'}"
    console.print(f"{plain(rate)} requests a second need {answer.machines} such machines ({spread})", style="bold")
