"""The GPU report: its rows, its arithmetic, its targets and how they are rendered."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import report as reports
from benchmarks.gpu import roofline
from benchmarks.gpu.job import Job, parse, read_details
from benchmarks.gpu.junit import read_junit
from benchmarks.gpu.parts import Part
from benchmarks.gpu.rows import CAPTION, QFORMER, STEP, VISION, Row, read_rows, single, write_rows
from benchmarks.gpu.runner import Outcome
from benchmarks.gpu.timing import LEAST, measure, rate
from benchmarks.sizes import ModelSizes, StageWeights
from tests.benchmarks.gpu_report.machines import NOTHING


def timed(system: str, what: str, batch: int, p50: float) -> Row:
    return Row(system, what, batch, "ms", p50 * 0.9, p50, p50 * 1.2, 7)


# --- rows, rates, tests ------------------------------------------------------------------------------------------


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [timed("a", STEP, 4, 1.5), single("b", "build", "s", 12.0)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
    assert read_rows(tmp_path / "none.csv") == []


def test_measuring_repeats_and_counts_the_inner_work() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.02)

    row = measure("system", "what", 2, run, seconds=0, inner=10)
    assert row.repeats == LEAST < len(calls)
    assert 2 <= row.p20 <= row.p50 <= row.p80 < 20
    assert (row.system, row.what, row.batch, row.unit) == ("system", "what", 2, "ms")


def test_a_rate_turns_the_percentiles_around() -> None:
    row = rate(Row("s", "copy", 0, "ms", 1, 2, 4, 5), 8, "GB/s")
    assert (row.p20, row.p50, row.p80, row.unit) == (2000, 4000, 8000, "GB/s")


def test_a_job_survives_its_command_line(tmp_path: Path) -> None:
    job = Job(tmp_path, "cuda", "bf16", Path("a checkpoint"), Path("work"), 2.5)
    assert parse(["measure", "tensorrt", *job.arguments()], "task", "engine") == (job, ["measure", "tensorrt"])
    job.keep([timed("a", STEP, 1, 1)])
    job.keep([timed("a", STEP, 2, 1)])
    assert [row.batch for row in read_rows(tmp_path / "rows.csv")] == [1, 2]
    job.note(a=1)
    job.note(b=2)
    assert read_details(tmp_path) == {"a": 1, "b": 2}


def test_junit_of_a_real_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip(reason='no reason')\ndef test_left_out(): pass\n"
    )
    command_line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=junit.xml"]
    subprocess.run(command_line, cwd=tmp_path, capture_output=True, check=False)
    tests = read_junit(tmp_path / "junit.xml")
    assert tests is not None
    assert (tests.passed, tests.failed) == (1, ("test_some::test_bad", "test_some::test_error"))
    assert dict(tests.skipped) == {"no reason": 1}
    (tmp_path / "junit.xml").write_text("<testsuites><testsuite")
    assert read_junit(tmp_path / "junit.xml") is None


# --- roofline and targets ----------------------------------------------------------------------------------------

SIZES = ModelSizes(
    stages={"vision_encoder": StageWeights(500, 0), "qformer": StageWeights(4_000_000, 0)},
    step_weights=10_000_000,
    cache_values=1000,
    cross_values=0,
    vision_flops=4_000_000_000,
    qformer_flops=1_000_000,
    image_tokens=0,
    vision_width=0,
    query_tokens=0,
    vocab_size=0,
)
DETAILS = {"sizes": SIZES.to_json(), "dtype": "fp16", "step_length": 50, "prompt_length": 49}
LIMITS = roofline.Limits(bandwidth=1e9, flops=1e12)


def test_bounds() -> None:
    rows = [
        timed("s", STEP, 2, 40.0),
        timed("s", VISION, 3, 24.0),
        timed("s", QFORMER, 1, 16.0),
        timed("s", CAPTION, 1, 1),
    ]
    step, vision, qformer = roofline.bounds(rows, DETAILS, LIMITS)
    assert step.bytes == 2 * (10_000_000 + 2 * 50 * 1000)
    assert (step.bound_ms, step.by) == (pytest.approx(20.2), "bandwidth")
    assert step.fraction == pytest.approx(20.2 / 40)
    assert (vision.bound_ms, vision.by, vision.fraction) == (pytest.approx(12.0), "operations", pytest.approx(0.5))
    assert (qformer.bound_ms, qformer.by, qformer.fraction) == (pytest.approx(8.0), "bandwidth", pytest.approx(0.5))


def test_limits_need_both() -> None:
    copy, matmul = single("torch", "copy", "GB/s", 3000), single("torch", "matmul fp16", "TFLOP/s", 800)
    assert roofline.Limits.of([copy, matmul], "fp16") == roofline.Limits(3e12, 8e14)
    assert roofline.Limits.of([copy, matmul], "bf16") is None
    assert roofline.Limits.of([matmul], "fp16") is None


@pytest.mark.parametrize(("measured_ms", "verdict"), [(28.0, "met"), (50.0, "missed by 29.8 points")])
def test_the_bandwidth_target(measured_ms: float, verdict: str) -> None:
    found = roofline.bounds([timed("s", STEP, 1, measured_ms)], DETAILS, LIMITS)
    target = roofline.bandwidth_target("s", found, "unused")
    assert target.verdict == verdict
    assert target.show(target.measured) == f"{20.1 / measured_ms:.1%}"


def test_caption_targets_are_met_missed_or_not_measured() -> None:
    rows = [timed("s", CAPTION, 1, 10), timed("s", CAPTION, 8, 20), timed(roofline.EAGER, CAPTION, 1, 50)]
    rows.append(timed(roofline.EAGER, CAPTION, 8, 60))
    reasons = {"s": "s is away", roofline.EAGER: "eager is away", roofline.COMPILED: "compiled is away"}
    verdicts = [target.verdict for target in roofline.caption_targets("s", rows, reasons)]
    assert verdicts == ["met", "missed by 2.00x", *["not measured because compiled is away"] * 2]
    nothing = [target.verdict for target in roofline.caption_targets("t", rows, {**reasons, "t": "t is away"})]
    assert nothing == ["not measured because t is away"] * 4


def test_kernel_targets_take_the_best_form() -> None:
    base = {"image_tokens": "257", "dtype": "fp16", "agrees": "True"}
    lines = [
        {**base, "batch": "1", "system": "projected", "sdpa_ratio": "1.1"},
        {**base, "batch": "1", "system": "absorbed", "sdpa_ratio": "1.4"},
        {**base, "batch": "1", "system": "compiled", "sdpa_ratio": "9.0"},
        {**base, "batch": "1", "system": "wrong", "sdpa_ratio": "8.0", "agrees": "False"},
        {**base, "batch": "8", "system": "projected", "sdpa_ratio": "1.2", "dtype": "bf16"},
    ]
    one, eight = roofline.kernel_targets(lines, "fp16", "")
    assert (one.measured, one.verdict) == (1.4, "met")
    assert eight.verdict == "not measured because kernels.csv has no row of batch 8"


def test_kernel_rows_without_the_ratio_are_said() -> None:
    lines = [{"batch": "1", "image_tokens": "257", "dtype": "fp16", "system": "projected"}]
    assert roofline.kernel_targets(lines, "fp16", "")[0].verdict == (
        "not measured because kernels.csv has no column sdpa_ratio, agrees"
    )


def test_a_cell_cannot_break_a_table() -> None:
    outcome = Outcome("skipped", "one | two")
    part = Part("odd", "an odd part", (), 1.0)
    text = reports.render(reports.Findings(NOTHING, {"odd": outcome}), [part])
    assert "skipped: one \\| two" in text
