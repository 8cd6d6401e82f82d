"""All that can be tested and measured on this machine's GPU, as one report.

    python -m benchmarks.gpu --report DIR                  every part that is possible here; a second run resumes
    python -m benchmarks.gpu --report DIR --only PART      this part, whether it is done or not
    python -m benchmarks.gpu --report DIR --fresh          forget what is there
    python -m benchmarks.gpu --report DIR --device cpu --checkpoint demo/checkpoint --dtype fp32
                                                           rehearse what can be without a GPU, with a small checkpoint

Exit status: 0 every part that can run here is done; 1 a part failed or timed out; 2 the command line is wrong, or the
folder holds a report of another machine; 3 there is no NVIDIA GPU (the report is written all the same).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import report as reports
from benchmarks.gpu.environment import Environment
from benchmarks.gpu.job import DTYPES
from benchmarks.gpu.parts import NO_GPU as NO_GPU_FOUND
from benchmarks.gpu.parts import PARTS_FOLDER, REPOSITORY, Part, Plan, make_parts, reason_to_skip
from benchmarks.gpu.runner import LOG_FILE, Outcome, run_part
from benchmarks.gpu.status import DONE, FAILED, MISUSED, NO_GPU

_PROBE = "environment"
_PROBE_LIMIT_S = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report; return the exit status."""
    options = _parse(arguments)
    checkpoint = options.checkpoint and options.checkpoint.resolve()
    plan = Plan(
        options.report.resolve(),
        options.work.resolve(),
        options.device,
        options.dtype,
        checkpoint,
        options.seconds,
        options.compile_backend,
    )
    all_parts = make_parts(plan)
    if unknown := set(options.only) - {part.name for part in all_parts}:
        return _refuse(f"there is no part {', '.join(sorted(unknown))}; there are {_names(all_parts)}")
    if plan.device == "cpu" and checkpoint is None:
        return _refuse("a rehearsal on the CPU needs --checkpoint FOLDER: the full-size model would take hours")
    if options.fresh:
        shutil.rmtree(plan.report / PARTS_FOLDER, ignore_errors=True)
        (plan.report / reports.ENVIRONMENT_FILE).unlink(missing_ok=True)
    environment = probe(plan.folder(_PROBE))
    if fault := other_machine(plan.report, environment):
        return _refuse(fault)
    environment.write(plan.report / reports.ENVIRONMENT_FILE)
    outcomes = run_parts(plan, all_parts, environment, only=options.only)
    print(f"The report is {plan.report / reports.REPORT_FILE}.")
    if environment.gpu is None and plan.device == "cuda":
        print("There is no NVIDIA GPU on this machine, so every part was skipped.")
        return NO_GPU
    return FAILED if any(outcome.status in ("failed", "timed out") for outcome in outcomes.values()) else DONE


def probe(folder: Path) -> Environment:
    """Look at this machine, in a process of its own.

    Raises:
        RuntimeError: that process failed.
    """
    file = folder / reports.ENVIRONMENT_FILE
    command = [sys.executable, "-m", "benchmarks.gpu.environment", str(file)]
    outcome = run_part(command, folder, _PROBE_LIMIT_S, working=REPOSITORY)
    if outcome.status != "done":
        raise RuntimeError(f"this machine cannot be looked at: {outcome.reason}:\n{outcome.tail}")
    return Environment.read(file)


def other_machine(folder: Path, environment: Environment) -> str | None:
    """What is wrong with a folder that holds a report of another machine."""
    path = folder / reports.ENVIRONMENT_FILE
    if not path.is_file():
        return None
    there = reports.machine_name(Environment.read(path))
    here = reports.machine_name(environment)
    if there == here:
        return None
    return f"{folder} holds a report of {there}, and this is {here}: name another folder, or give --fresh"


def run_parts(
    plan: Plan, all_parts: Sequence[Part], environment: Environment, *, only: Sequence[str] = ()
) -> dict[str, Outcome]:
    """Run what is to be run, and write the report after each part; return the outcomes of this run's parts.

    A part that is done already is not run again, unless ``only`` names it.
    """
    reports.write_report(plan, all_parts, environment)
    outcomes = reports.read_outcomes(plan, all_parts)
    chosen = {part.name: part for part in all_parts if not only or part.name in only}
    for name, part in chosen.items():
        if not only and name in outcomes and outcomes[name].status == "done":
            print(f"{name}: done before")
            continue
        outcomes[name] = _run(part, plan, environment, outcomes)
        reports.write_report(plan, all_parts, environment)
    return {name: outcomes[name] for name in chosen}


def _run(part: Part, plan: Plan, environment: Environment, outcomes: dict[str, Outcome]) -> Outcome:
    folder = plan.folder(part.name)
    if reason := reason_to_skip(part, environment, plan, outcomes):
        shutil.rmtree(folder, ignore_errors=True)
        outcome = Outcome("skipped", reason)
        outcome.write(folder)
    else:
        print(f"{part.name}: {part.title} (at most {part.limit / 60:g} minutes; {folder / LOG_FILE})", flush=True)
        outcome = run_part(part.full_command, folder, part.limit, working=REPOSITORY, passing=part.passing)
    if outcome.reason != NO_GPU_FOUND:  # of all parts then, and said once
        took = f" after {outcome.seconds:.0f} s" if outcome.seconds else ""
        print(f"{part.name}: {outcome.status}{took}{': ' if outcome.reason else ''}{outcome.reason}", flush=True)
    return outcome


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="A report on this machine's GPU.")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".work" / "gpu", help="folder for 20 GB of models")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="run this part; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="forget what the folder of the report holds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--checkpoint", type=Path, help="measure this one instead of the full-size model")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each quantity")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile")
    return parser.parse_args(arguments)


def _refuse(fault: str) -> int:
    print(f"benchmarks.gpu: {fault}", file=sys.stderr)
    return MISUSED


def _names(all_parts: Sequence[Part]) -> str:
    return ", ".join(part.name for part in all_parts)


if __name__ == "__main__":
    sys.exit(main())
