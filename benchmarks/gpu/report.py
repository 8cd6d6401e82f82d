"""The report: ``report.md`` and the tables and plots beside it, made anew from what the parts have left on disk."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts as names
from benchmarks.gpu import roofline
from benchmarks.gpu.environment import Environment
from benchmarks.gpu.huggingface import TOKENS
from benchmarks.gpu.job import ROWS_FILE, read_details
from benchmarks.gpu.junit import TestSummary, read_junit
from benchmarks.gpu.parts import Part, Plan
from benchmarks.gpu.plots import draw_all
from benchmarks.gpu.rows import CAPTION, FILE, Row, read_rows, write_rows
from benchmarks.gpu.runner import Outcome
from benchmarks.likeness import agreement

REPORT_FILE, ENVIRONMENT_FILE, ALL_ROWS_FILE, ROOFLINE_FILE = (
    "report.md",
    "environment.json",
    "rows.csv",
    "roofline.csv",
)
_NOT_RUN = "not run yet"
_SMI_UNITS = {"power.limit": "W"}


@dataclass(frozen=True)
class Findings:
    """All that the parts have left on disk.

    Attributes:
        environment: of the machine.
        outcomes: of the parts that were run or skipped, by name.
        rows: of all parts.
        bounds: of the engines, by name.
        tokens: of the captions of each system, by part.
        tests: of the parts that run tests.
        targets: what is wanted, and whether it is met.
    """

    environment: Environment
    outcomes: Mapping[str, Outcome]
    rows: Sequence[Row] = ()
    bounds: Mapping[str, Sequence[roofline.Bound]] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    tests: Mapping[str, TestSummary] = field(default_factory=dict)
    targets: Sequence[roofline.Target] = ()


def read_outcomes(plan: Plan, all_parts: Sequence[Part]) -> dict[str, Outcome]:
    """How the parts went, as far as they were run."""
    found = {part.name: Outcome.read(plan.folder(part.name)) for part in all_parts}
    return {name: outcome for name, outcome in found.items() if outcome is not None}


def collect(plan: Plan, all_parts: Sequence[Part], environment: Environment) -> Findings:
    """Read what the parts have left."""
    outcomes = read_outcomes(plan, all_parts)
    of_part = {part.name: read_rows(plan.folder(part.name) / ROWS_FILE) for part in all_parts}
    rows = [row for own in of_part.values() for row in own]
    details = {part.name: read_details(plan.folder(part.name)) for part in all_parts}
    limits = roofline.Limits.of(rows, plan.dtype)
    found = {
        engine: roofline.bounds(of_part[engine], details[engine], limits)
        for engine in plan.engines
        if limits and "step_length" in details.get(engine, {})
    }
    return Findings(
        environment,
        outcomes,
        rows,
        found,
        {name: noted["tokens"] for name, noted in details.items() if "tokens" in noted},
        {name: tests for name in of_part if (tests := read_junit(plan.folder(name) / "junit.xml"))},
        _targets(plan, outcomes, rows, found),
    )


def _targets(
    plan: Plan, outcomes: Mapping[str, Outcome], rows: Sequence[Row], found: Mapping[str, Sequence[roofline.Bound]]
) -> list[roofline.Target]:
    engine = plan.engines[0]
    system = f"blipstream-{engine}"
    missing = {name: _why_missing(name, outcomes) for name in (engine, names.LIMITS, names.KERNELS)}
    reasons = {
        system: missing[engine],
        roofline.EAGER: _why_missing(names.EAGER, outcomes),
        roofline.COMPILED: _why_missing(names.COMPILED, outcomes),
    }
    has_step = any(row.system == system and row.what == roofline.STEP for row in rows)
    return [
        roofline.bandwidth_target(system, found.get(engine, ()), missing[names.LIMITS if has_step else engine]),
        *roofline.caption_targets(system, rows, reasons),
        *roofline.kernel_targets(_kernel_lines(plan), plan.dtype, missing[names.KERNELS]),
    ]


def _why_missing(part: str, outcomes: Mapping[str, Outcome]) -> str:
    """Why there are no figures of a part."""
    outcome = outcomes.get(part)
    if outcome is None:
        return f"{part} is {_NOT_RUN}"
    if outcome.status == "done":
        return f"{part} left no figure of it"
    return f"{part} was skipped: {outcome.reason}" if outcome.status == "skipped" else f"{part} {outcome.status}"


def _kernel_lines(plan: Plan) -> list[dict[str, str]]:
    path = plan.folder(names.KERNELS) / names.KERNELS_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_report(plan: Plan, all_parts: Sequence[Part], environment: Environment) -> Findings:
    """Write everything but what the parts write themselves."""
    findings = collect(plan, all_parts, environment)
    write_rows(plan.report / ALL_ROWS_FILE, findings.rows)
    _write_roofline(plan.report / ROOFLINE_FILE, findings.bounds)
    plots = draw_all(findings.rows, machine_name(environment), plan.report)
    (plan.report / REPORT_FILE).write_text(render(findings, all_parts, plots), encoding="utf-8")
    return findings


def machine_name(environment: Environment) -> str:
    """The GPU, or the CPU where there is none."""
    return environment.gpu or f"no GPU; {environment.cpu}, {environment.cores} cores"


def render(findings: Findings, all_parts: Sequence[Part], plots: Sequence[Path] = ()) -> str:
    """``report.md``."""
    environment = findings.environment
    sections = [
        f"# Report: {machine_name(environment)}",
        _summary(findings, all_parts),
        "## Targets\n\n" + _table(("target", "wanted", "measured", ""), map(_target_cells, findings.targets)),
        "## Parts\n\n"
        + _table(("part", "what", "", "seconds"), (_part_cells(part, findings.outcomes) for part in all_parts)),
        "## Machine\n\n" + _table(("", ""), _machine_cells(environment)),
        *_captions(findings),
        *_stages(findings),
        *_roofline(findings),
        *(f"![{path.stem}]({path.name})" for path in plots),
        *_tests(findings),
        *_failures(findings),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(findings: Findings, all_parts: Sequence[Part]) -> str:
    counts: dict[str, int] = {}
    for part in all_parts:
        outcome = findings.outcomes.get(part.name)
        status = outcome.status if outcome else _NOT_RUN
        counts[status] = counts.get(status, 0) + 1
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    start = f"{findings.environment.date}. Parts: {text}."
    return start if findings.environment.gpu else f"{start} There is no NVIDIA GPU on this machine."


def _target_cells(target: roofline.Target) -> tuple[str, ...]:
    return target.name, target.show(target.wanted), target.show(target.measured), target.verdict


def _part_cells(part: Part, outcomes: Mapping[str, Outcome]) -> tuple[str, ...]:
    outcome = outcomes.get(part.name)
    if outcome is None:
        return part.name, part.title, _NOT_RUN, ""
    how = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
    return part.name, part.title, how, f"{outcome.seconds:.0f}" if outcome.seconds else ""


def _machine_cells(environment: Environment) -> list[tuple[str, str]]:
    memory = f"{environment.gpu_memory / (1 << 30):.1f} GiB" if environment.gpu_memory else None
    known: dict[str, Any] = {
        "GPU": environment.gpu,
        "compute capability": environment.compute_capability,
        "memory": memory,
        "driver": environment.driver,
        "CUDA of torch": environment.torch_cuda,
        **{name: f"{value} {_SMI_UNITS.get(name, 'MHz')}" for name, value in environment.clocks.items()},
        "CPU": f"{environment.cpu}, {environment.cores} cores",
        "providers of ONNX Runtime": ", ".join(environment.providers) or "none",
        **environment.versions,
    }
    return [(name, str(value) if value is not None else "unknown") for name, value in known.items()]


def _captions(findings: Findings) -> list[str]:
    rows = [row for row in findings.rows if row.what == CAPTION]
    if not rows:
        return []
    fastest = {batch: min(row.p50 for row in rows if row.batch == batch) for batch in {row.batch for row in rows}}
    cells = [
        (row.system, str(row.batch), _quantiles(row), f"{row.p50 / fastest[row.batch]:.2f}x")
        for row in sorted(rows, key=lambda row: (row.batch, row.p50))
    ]
    text = (
        f"Captions of {TOKENS} tokens, from pixels in host memory to tokens in host memory; ms: median "
        "(20th to 80th percentile).\n\n" + _table(("system", "batch", "ms", "over the fastest"), cells)
    )
    return ["## Captions", text, *_agreement(findings)]


def _agreement(findings: Findings) -> list[str]:
    """How far the tokens are those of transformers."""
    exact = findings.tokens.get(names.EAGER)
    others = {name: tokens for name, tokens in findings.tokens.items() if name != names.EAGER}
    if exact is None or not others:
        return []
    shares = [
        f"{name} {agreement([tuple(ids) for ids in tokens], [tuple(ids) for ids in exact]):.1%}"
        for name, tokens in others.items()
    ]
    return [f"Share of the tokens of {names.EAGER}, up to the first that differs in each caption: {', '.join(shares)}."]


def _stages(findings: Findings) -> list[str]:
    rows = [row for row in findings.rows if row.what != CAPTION]
    if not rows:
        return []
    cells = [
        (row.system, row.what, str(row.batch or ""), _quantiles(row) if row.repeats > 1 else f"{row.p50:g}", row.unit)
        for row in sorted(rows, key=lambda row: (row.what.startswith(FILE), row.system, row.what, row.batch))
    ]
    return ["## Stages, builds and limits", _table(("system", "what", "batch", "median (p20 to p80)", "unit"), cells)]


def _roofline(findings: Findings) -> list[str]:
    cells = [_bound_cells(engine, bound) for engine, found in findings.bounds.items() for bound in found]
    if not cells:
        return []
    columns = ("engine", "stage", "batch", "bound by", "bound, ms", "measured, ms", "fraction")
    return ["## Roofline", _table(columns, cells)]


def _bound_cells(engine: str, bound: roofline.Bound) -> tuple[str, ...]:
    times = (f"{bound.bound_ms:.3f}", f"{bound.row.p50:.3f}")
    return engine, bound.row.what, str(bound.row.batch), bound.by, *times, f"{bound.fraction:.1%}"


def _tests(findings: Findings) -> list[str]:
    if not findings.tests:
        return []
    lines = []
    for name, tests in findings.tests.items():
        lines.append(f"- {name}: {tests.passed} passed, {len(tests.failed)} failed, {tests.skipped.total()} skipped")
        lines += [f"  - failed: `{test}`" for test in tests.failed]
        lines += [f"  - skipped, {count}: {reason}" for reason, count in tests.skipped.items()]
    return ["## Tests", "\n".join(lines)]


def _failures(findings: Findings) -> list[str]:
    failed = {name: outcome for name, outcome in findings.outcomes.items() if outcome.tail}
    if not failed:
        return []
    texts = [f"### {name}: {outcome.reason}\n\n```\n{outcome.tail}\n```" for name, outcome in failed.items()]
    return ["## What went wrong", *texts]


def _quantiles(row: Row) -> str:
    return f"{row.p50:.2f} ({row.p20:.2f} to {row.p80:.2f})"


def _table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _write_roofline(path: Path, found: Mapping[str, Sequence[roofline.Bound]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("engine", "stage", "batch", "bytes", "bound_by", "bound_ms", "measured_ms", "fraction"))
        for engine, own in found.items():
            for bound in own:
                times = (round(bound.bound_ms, 5), bound.row.p50, round(bound.fraction, 4))
                writer.writerow((engine, bound.row.what, bound.row.batch, bound.bytes, bound.by, *times))
