"""Full-size models with random weights.

    python -m benchmarks.fullsize checkpoint opt-2.7b FOLDER     write a checkpoint
    python -m benchmarks.fullsize run FOLDER BUNDLE --precision int8
                                                                  build it, and time one caption at a time from the
                                                                  bundle and from transformers in bf16 and fp32
    python -m benchmarks.fullsize stages FOLDER BUNDLE           time the stages of a bundle, without a server
    python -m benchmarks.fullsize questions FOLDER BUNDLE        further questions about an image, and what the server
                                                                  adds to its engines

``run`` adds rows to benchmarks/results/fullsize.csv. It wants a quiet machine, and memory for the model in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.fullsize.measure import Built, Captions, build, bundle_bytes, generate, serve
from benchmarks.fullsize.questions import ask
from benchmarks.fullsize.rows import FullSizeRow, QuestionRow, StageRow, draw_stages
from benchmarks.fullsize.stages import STEP, bandwidth, bandwidth_share, step_bytes, time_stages
from benchmarks.likeness import agreement
from benchmarks.memory import gib
from benchmarks.rows import Setting, append_rows, read_rows
from benchmarks.run import RESULTS
from benchmarks.setting import make_setting
from blipstream.manifest import Manifest
from blipstream.triton.server import TritonServer

PEERS = ("bf16", "fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.command == "checkpoint":
        from benchmarks.fullsize.checkpoint import write_checkpoint

        write_checkpoint(options.kind, options.folder, options.layers)
        return 0
    command = shlex.join(["python", "-m", "benchmarks.fullsize", *arguments])
    console = Console()
    if options.command == "stages":
        stages = _stages(options, command)
        file = options.results / "stages.csv"
        append_rows(file, stages)
        draw_stages(read_rows(file, StageRow), stages[0], options.results / f"stages-{stages[0].checkpoint_name}.png")
        for stage in stages:
            share = f", {stage.bandwidth_share:.0%} of the memory's bandwidth" if stage.bandwidth_share else ""
            console.print(f"{stage.stage}, {stage.rows} at once: {stage.p50_ms:.1f} ms{share}")
        return 0
    if options.command == "questions":
        row = _questions(options, command)
        append_rows(options.results / "questions.csv", [row])
        console.print(
            f"a further question is {row.second_ratio:.2f} times as fast as the first ({row.second_p50_s:.3f} s); "
            f"the server adds {row.overhead:.1%} to its engines"
        )
        return 0
    rows = _run(options, command)
    append_rows(options.results / "fullsize.csv", rows)
    for row in rows:
        console.print(f"{row.system}: {row.caption_p50_s:.2f} s a caption, {row.caption_ratio:.2f} times Blipstream's")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.fullsize", description="Full-size models with random weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint", help="write a checkpoint")
    checkpoint.add_argument("kind", help="opt-2.7b, opt-6.7b or flan-t5-xl")
    checkpoint.add_argument("folder", type=Path)
    checkpoint.add_argument("--layers", type=int, help="cut every stack to so many layers, for trials")
    run = commands.add_parser("run", help="build a bundle, and time captions")
    run.add_argument("folder", type=Path, help="the checkpoint")
    run.add_argument("bundle", type=Path)
    run.add_argument("--precision", default="int8")
    run.add_argument("--captions", type=int, default=3, help="of each system")
    run.add_argument("--built", action="store_true", help="take the bundle as it is; the build's figures are 0")
    run.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    stages = commands.add_parser("stages", help="time the stages of a bundle, without a server")
    stages.add_argument("folder", type=Path, help="the checkpoint, for its name")
    stages.add_argument("bundle", type=Path)
    stages.add_argument("--rounds", type=int, default=7)
    stages.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    questions = commands.add_parser("questions", help="further questions, and what the server adds to its engines")
    questions.add_argument("folder", type=Path, help="the checkpoint, for its name")
    questions.add_argument("bundle", type=Path)
    questions.add_argument("--images", type=int, default=7)
    questions.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    return parser.parse_args(arguments)


def _questions(options: argparse.Namespace, command: str) -> QuestionRow:
    threads, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    with TritonServer(options.bundle) as server:
        setting = make_setting(server, options.folder, threads, command, load)
        found = ask(server, options.images)
    return QuestionRow(
        **dataclasses.asdict(setting),
        precision=_precision(options.bundle),
        images=options.images,
        first_p50_s=round(found.first, 4),
        second_p50_s=round(found.second, 4),
        second_ratio=round(found.first / found.second, 3),
        caption_p50_s=round(found.caption, 4),
        overhead=round(found.caption / found.caption_engines - 1, 4),
    )


def _precision(bundle: Path) -> str:
    """Of ViT, Q-Former and decoder."""
    return "/".join(Manifest.load(bundle).precision.values())


def _stages(options: argparse.Namespace, command: str) -> list[StageRow]:
    threads, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    setting = make_setting(None, options.folder, threads, command, load)
    timings = time_stages(options.bundle, threads, options.rounds)
    read = step_bytes(options.bundle)
    return [
        StageRow(
            **dataclasses.asdict(setting),
            precision=_precision(options.bundle),
            stage=timing.stage,
            rows=timing.rows,
            rounds=options.rounds,
            p50_ms=round(1000 * timing.median, 3),
            min_ms=round(1000 * min(timing.seconds), 3),
            max_ms=round(1000 * max(timing.seconds), 3),
            bandwidth_gbs=round(bandwidth(timings) / 1e9, 2),
            bandwidth_share=round(bandwidth_share(timing, read, timings), 3) if timing.stage == STEP else 0.0,
        )
        for timing in timings
    ]


def _run(options: argparse.Namespace, command: str) -> list[FullSizeRow]:
    threads, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    built = Built(0, 0, "") if options.built else build(options.folder, options.bundle, options.precision)
    print(built.printed or "built before", flush=True)
    captions, ready, setting = serve(options.bundle, options.captions, options.folder, threads, command, load)
    systems = {f"blipstream-{options.precision}": captions}
    for dtype in options.peers:
        log = options.bundle.with_name(f"{options.bundle.name}-{dtype}.log")
        systems[f"transformers-{dtype}"] = generate(options.folder, dtype, options.captions, threads, log)
    exact = systems.get("transformers-fp32")
    rows = [_row(setting, name, own, captions, exact) for name, own in systems.items()]
    first = dataclasses.replace(
        rows[0],
        build_s=round(built.seconds, 1),
        build_peak_gib=gib(built.peak_bytes),
        bundle_gib=gib(bundle_bytes(options.bundle)),
        start_s=round(ready, 1),
    )
    return [first, *rows[1:]]


def _row(setting: Setting, system: str, own: Captions, ours: Captions, exact: Captions | None) -> FullSizeRow:
    return FullSizeRow(
        **dataclasses.asdict(setting),
        system=system,
        captions=len(own.seconds),
        caption_p50_s=round(own.median, 3),
        memory_gib=gib(own.memory_bytes),
        caption_ratio=round(own.median / ours.median, 3),
        tokens_equal=round(agreement(own.token_ids, exact.token_ids), 4) if exact else float("nan"),
        build_s=0,
        build_peak_gib=0,
        bundle_gib=0,
        start_s=0,
    )


if __name__ == "__main__":
    sys.exit(main())
