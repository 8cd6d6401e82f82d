"""Blipstream against its peers, at full size.

    python -m benchmarks.compare CHECKPOINT BUNDLE [--systems NAME ...] [--tasks NAME ...] [--rounds N]

Each peer runs in a process of its own, in an environment of its own (made at the first run, under ``--work``), beside a
server of the bundle; in each round both get the same requests, one after the other. A peer's process has a whole model
in memory: OPT-2.7B takes 15 GiB in fp32. Rows are added to benchmarks/results/compare.csv task by task, and a plot of
the last ones is drawn beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare.measure import Pair, Rounds
from benchmarks.compare.ours import Blipstream
from benchmarks.compare.process import Peer, PeerError
from benchmarks.compare.rows import FILE, ComparedRow, draw
from benchmarks.compare.systems import BATCHES, ENGINE, SYSTEMS, System
from benchmarks.compare.tasks import LANGUAGE, Task, make_tasks, tokens_of
from benchmarks.likeness import likeness
from benchmarks.memory import gib
from benchmarks.rows import append_rows, read_rows
from benchmarks.run import RESULTS
from benchmarks.setting import make_setting
from blipstream.errors import BlipstreamError
from blipstream.manifest import Manifest

_SEEDS = 1000
"""Rounds that a task may have, with requests of their own."""


@dataclass(frozen=True)
class Measured:
    """A peer and Blipstream on one task."""

    pair: Pair
    versions: Mapping[str, str]
    peer_bytes: int
    ours_bytes: int


class Comparison:
    """All peers, one after the other."""

    def __init__(self, options: argparse.Namespace, command: str, console: Console) -> None:
        self._options = options
        self._console = console
        self._work: Path = options.work
        self._threads = len(os.sched_getaffinity(0))
        self.setting = make_setting(None, options.checkpoint, self._threads, command, os.getloadavg()[0])
        self._tasks = make_tasks(options.answers, Manifest.load(options.bundle).image.size)
        self._references: dict[str, tuple[str, Sequence[Any]]] = {}

    def rows(self, name: str) -> Iterator[ComparedRow]:
        """One system beside Blipstream, a row for each of its tasks that is wanted.

        Raises:
            PeerError: it does not start, or fails.
        """
        system = SYSTEMS[name]
        wanted = [(task, int(batch or 0)) for task, _, batch in (own.partition(":") for own in system.tasks)]
        tasks, batches = self._options.tasks, (0, *self._options.batches)
        wanted = [(task, batch) for task, batch in wanted if task.partition("-")[0] in tasks and batch in batches]
        if not wanted:
            return
        if self._options.apart:
            for task, batch in wanted:
                yield self._compare(name, task, batch, lambda rounds: self._apart(system, name, rounds))
            return
        self._say(f"{name}: starting")
        with self._start(system, name) as peer:
            for task, batch in wanted:
                yield self._compare(name, task, batch, lambda rounds: self._beside(peer, rounds))

    def _compare(self, name: str, task_name: str, batch: int, measure: Callable[[Rounds], Measured]) -> ComparedRow:
        task, first = self._tasks[task_name], list(self._tasks).index(task_name) * _SEEDS
        title, folder = f"{name}: {task_name}" + (f" by {batch}" if batch else ""), self._work / "requests" / task_name
        measured = measure(Rounds(task, first, folder, batch, lambda number: self._say(f"{title}, round {number}")))
        tokens = [tokens_of(task.requests(first + number, folder)) for number in range(self._options.rounds)]
        return self._row(name, task_name, batch, measured, statistics.median(tokens))

    def _beside(self, peer: Peer, rounds: Rounds) -> Measured:
        """Both in memory, in turn."""
        with self._ours(rounds.task) as ours:
            pair = rounds.run(peer, ours, self._options.rounds)
            return Measured(pair, peer.versions, peer.memory_bytes(), ours.memory_bytes())

    def _apart(self, system: System, name: str, rounds: Rounds) -> Measured:
        """One after the other, each with the machine to itself."""
        with self._start(system, name) as peer:
            theirs = rounds.alone(peer, rounds.batch, self._options.rounds)
            versions, memory = peer.versions, peer.memory_bytes()
        with self._ours(rounds.task) as ours:
            pair = Pair(theirs, rounds.alone(ours, rounds.task.count, self._options.rounds))
            return Measured(pair, versions, memory, ours.memory_bytes())

    def _row(self, name: str, task_name: str, batch: int, measured: Measured, tokens: float) -> ComparedRow:
        pair, task = measured.pair, self._tasks[task_name]
        reference, outputs = self._references.setdefault(task_name, (name, pair.peer.outputs))
        return ComparedRow(
            **dataclasses.asdict(self.setting),
            task=task_name,
            system=name,
            versions=" ".join(f"{package} {version}" for package, version in measured.versions.items()),
            batch=batch or task.count,
            requests=task.count,
            rounds=len(pair.ratios),
            apart=self._options.apart,
            p50_s=round(pair.peer.median, 4),
            blipstream_p50_s=round(pair.ours.median, 4),
            tokens_per_s=round(tokens / pair.peer.median, 3),
            blipstream_tokens_per_s=round(tokens / pair.ours.median, 3),
            ratio=round(statistics.median(pair.ratios), 3),
            ratio_min=round(min(pair.ratios), 3),
            ratio_max=round(max(pair.ratios), 3),
            reference=reference,
            agreement=round(likeness(pair.peer.outputs, outputs), 4),
            blipstream_agreement=round(likeness(pair.ours.outputs, outputs), 4),
            memory_gib=gib(measured.peer_bytes),
            blipstream_memory_gib=gib(measured.ours_bytes),
        )

    def _ours(self, task: Task) -> AbstractContextManager[Any]:
        """A fresh server, whose caches know nothing; without images, the engine."""
        if task.name == LANGUAGE:
            return self._start(ENGINE, "engine")
        return Blipstream(self._options.bundle)

    def _start(self, system: System, name: str) -> Peer:
        options = self._options
        return system.start(options.checkpoint, options.bundle, self._work, self._threads, self._work / f"{name}.log")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 1 when a system failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    console = Console()
    comparison = Comparison(options, shlex.join(["python", "-m", "benchmarks.compare", *arguments]), console)
    failed = False
    for name in options.systems:
        try:
            for row in comparison.rows(name):
                append_rows(options.results / FILE, [row])
                console.print(f"[bold]{row.system}, {row.task} by {row.batch}: {row.ratio:.2f} times as long[/bold]")
        except (PeerError, BlipstreamError) as error:
            failed = True
            console.print(f"{name} failed: {error}", style="red", highlight=False)
    if (options.results / FILE).exists():
        rows = read_rows(options.results / FILE, ComparedRow)
        draw(rows, comparison.setting, options.results / f"compare-{comparison.setting.checkpoint_name}.png")
    return int(failed)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    tasks = tuple(dict.fromkeys(name.partition("-")[0] for name in make_tasks(1, 1)))
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description="Blipstream against its peers.")
    parser.add_argument("checkpoint", type=lambda text: Path(text).resolve(), help="folder, in the Hugging Face layout")
    parser.add_argument("bundle", type=lambda text: Path(text).resolve(), help="built from it")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks, metavar="NAME", help=", ".join(tasks))
    parser.add_argument(
        "--batches", nargs="+", type=int, default=BATCHES, choices=BATCHES, help="static ones, of answers"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="never both in memory, all rounds of one before the other")
    parser.add_argument("--answers", type=int, default=32, help="requests of a round of answers")
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), default=Path(".work/compare").resolve())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
