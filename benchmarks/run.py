"""``make bench``: Blipstream on a real Triton server against transformers, measured in the same run.

    python -m benchmarks.run --work FOLDER [--quick]

Exits with status 1 when an answer of Blipstream differs from that of transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from blipstream_export.build import BuildOptions, build
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import workload
from benchmarks.harness import System
from benchmarks.measure import Plan, Rounds, measure
from benchmarks.peers import Batching, Blipstream, Transformers
from benchmarks.plot import draw
from benchmarks.rows import Row, append_rows, make_rows
from benchmarks.setting import make_setting
from blipstream.triton.server import TritonServer

RESULTS = Path(__file__).resolve().parent / "results"
SEQUENTIAL = "transformers-sequential"
PEERS = {SEQUENTIAL: 1, "transformers-batch-4": 4, "transformers-batch-16": 16}
"""Batch size of each peer."""
_TABLE_WIDTH = 120
"""Columns of the table, in a narrower terminal or in a log as well."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, serve, measure, write rows and plots; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    console = Console()
    plan = Plan(16, 1) if options.quick else Plan(options.requests, options.rounds)
    threads = len(os.sched_getaffinity(0))
    load_average = os.getloadavg()[0]  # before the build and the server add to it
    bundle = options.bundle or options.work / "benchmark-bundle"
    if options.bundle is None:
        with console.status(f"building {bundle}"):
            build(str(options.checkpoint), bundle, BuildOptions(replace=True))
    with TritonServer(bundle) as server, _systems(server, options.checkpoint, threads) as systems:
        command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
        setting = make_setting(server, options.checkpoint, threads, command, load_average)
        rounds = _measure(systems, plan, console)
    rows = [row for load in plan.loads for row in make_rows(setting, load, rounds[load], list(PEERS))]
    append_rows(options.results / "serving.csv", rows)
    for name in (workload.DISTINCT, workload.REPEATED):
        draw([row for row in rows if row.workload == name], options.results / f"serving-{name}.png")
    Console(width=max(console.width, _TABLE_WIDTH)).print(_table(rows))
    console.print(f"rows and plots are in {options.results}")
    return 0 if all(row.outputs_equal == 1 for row in rows if row.system == Blipstream.name) else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description="Blipstream against transformers.")
    parser.add_argument("--work", type=Path, default=Path(".work"), help="folder for the bundle")
    parser.add_argument("--bundle", type=Path, help="serve this bundle of the checkpoint instead of building one")
    parser.add_argument("--checkpoint", type=Path, default=workload.CHECKPOINT)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for rows and plots")
    parser.add_argument("--requests", type=_positive, default=64, help="requests of each round of each load")
    parser.add_argument("--rounds", type=_positive, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 16 requests")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, but got {text!r}")
    return int(text)


@contextlib.contextmanager
def _systems(server: TritonServer, checkpoint: Path, threads: int) -> Iterator[list[System]]:
    """Everything that is measured; transformers' workers share one model."""
    generate = Transformers(checkpoint, threads)
    with contextlib.ExitStack() as stack:
        systems: list[System] = [stack.enter_context(contextlib.closing(Blipstream(server.grpc_url)))]
        systems += [stack.enter_context(Batching(name, generate, size)) for name, size in PEERS.items()]
        yield systems


def _measure(systems: list[System], plan: Plan, console: Console) -> Rounds:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=plan.rounds * len(plan.loads) * len(systems))

        def on_progress(description: str, done: int) -> None:
            progress.update(task, description=description or None, advance=done)

        return measure(systems, SEQUENTIAL, plan, on_progress)


def _table(rows: Sequence[Row]) -> Table:
    """The medians that matter most; a ratio is over the best peer."""
    table = Table(title="medians over the rounds, times in ms; (x): over the best of transformers")
    for name in ("images", "clients", "system"):
        table.add_column(name)
    for name in ("requests/s", "TTFT p50", "p95", "latency p50", "p95", "equal"):
        table.add_column(name, justify="right")
    for number, row in enumerate(rows):
        last_of_load = number + 1 == len(rows) or rows[number + 1].system == rows[0].system
        table.add_row(
            row.workload,
            str(row.concurrency),
            row.system,
            f"{row.request_throughput:.1f} ({row.request_throughput_ratio:.2f}x)",
            f"{row.time_to_first_token_p50_ms:.0f} ({row.time_to_first_token_p50_ratio:.2f}x)",
            f"{row.time_to_first_token_p95_ms:.0f}",
            f"{row.request_latency_p50_ms:.0f} ({row.request_latency_p50_ratio:.2f}x)",
            f"{row.request_latency_p95_ms:.0f}",
            f"{row.outputs_equal:.1%}",
            end_section=last_of_load,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
