"""The benchmark of the kernels: its arithmetic, what it measures, and a rehearsal in the interpreter."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blipstream_kernels.plan import FORMS, config_of
from blipstream_kernels.tiles import INTERPRETED

from benchmarks import kernels
from benchmarks.gpu.roofline import KERNEL_COLUMNS, PEER_SYSTEMS
from benchmarks.kernels import (
    PUBLISHED,
    TINY,
    Bench,
    Inputs,
    System,
    absorbed_multiply_adds,
    append,
    compiled,
    draw,
    key_value_bytes,
    launched_multiply_adds,
    least_bytes,
    problems,
    regrouped,
    sdpa,
    split_counts,
    systems,
    usual_multiply_adds,
)

rehearsal = pytest.mark.skipif(not INTERPRETED.value, reason="TRITON_INTERPRET=1 rehearses it")
BENCH = Bench("cpu", 0.01, "rehearsal", 10.0, {"fp16": 1.0})


def test_multiply_adds_and_bytes_of_the_published_shapes() -> None:
    assert usual_multiply_adds(PUBLISHED) == 2 * 257 * 1408 * 768 + 2 * 32 * 257 * 768
    assert absorbed_multiply_adds(PUBLISHED) == 12 * 2 * 32 * 1408 * (257 + 64)
    weights = 2 * 768 * 1408 + 2 * 768
    assert least_bytes(PUBLISHED) == 2 * (weights + 257 * 1408 + 2 * 32 * 768)
    assert least_bytes(replace(PUBLISHED, batch=2)) - least_bytes(PUBLISHED) == 2 * (257 * 1408 + 2 * 32 * 768)
    assert key_value_bytes(PUBLISHED) == 2 * 2 * 257 * 2 * 768


def test_what_is_launched_is_whole_blocks() -> None:
    whole = replace(PUBLISHED, tokens=640)  # of either form's blocks
    assert launched_multiply_adds(whole, "projected") == usual_multiply_adds(whole)
    for form in FORMS:
        block = config_of(form, "fp16").block_tokens
        one, two = (replace(PUBLISHED, tokens=tokens, batch=3) for tokens in (block, block + 1))
        assert launched_multiply_adds(two, form) == 2 * launched_multiply_adds(one, form)


def test_splits_are_those_that_whole_blocks_can_make() -> None:
    assert split_counts(PUBLISHED, "absorbed") == [1, 2, 3]
    assert split_counts(PUBLISHED, "projected") == [1, 2, 3, 5]
    assert split_counts(replace(PUBLISHED, tokens=20), "absorbed") == [1]


def test_a_gpu_measures_every_batch_length_and_type() -> None:
    found = [(problem.batch, problem.tokens, problem.dtype) for problem in problems("cuda")]
    assert len(found) == len(set(found)) == 6 * 2 * 2
    assert found[0] == (1, 257, "fp16")


def test_every_system_computes_the_same(device: torch.device) -> None:
    inputs = draw(replace(TINY, batch=2), device.type)
    for system in systems(inputs.problem, device.type):
        assert kernels.difference(system.run(inputs), inputs) < 5e-3, system.name


@rehearsal
def test_the_planners_row_says_what_it_chose() -> None:
    (own,) = [system for system in systems(PUBLISHED, "cpu") if system.name == "fused"]
    assert own.form in FORMS
    assert own.splits > 1


def test_each_size_is_compiled_though_torch_stops_after_eight() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        seen.append(graph)
        return graph.forward

    for tokens in range(1, 13):
        inputs = draw(replace(TINY, tokens=tokens), "cpu")
        assert torch.equal(compiled(backend=backend, fullgraph=True)(inputs), sdpa(inputs))
        assert len(seen) == tokens


def test_the_regrouped_products_copy_no_image_for_a_head_and_no_weight_for_an_image() -> None:
    problem = replace(TINY, batch=6, heads=4, tokens=50, width=200)
    inputs = draw(problem, "cpu")
    with torch.profiler.profile(record_shapes=True) as profile:
        regrouped(inputs)
    copies = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    products = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert len(products) == 4
    rows = problem.batch * problem.heads * problem.queries * problem.width
    assert all(torch.Size(shape).numel() <= rows for shape in copies), copies


@rehearsal
def test_the_rehearsal_and_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cpu", "--seconds", "0.01"]) == 0
    assert "x sdpa" in capsys.readouterr().out
    rows = [row for row in BENCH.rows(TINY) if row is not None]
    assert rows[0].system == "sdpa"
    assert rows[0].sdpa_ratio == 1
    assert {"sdpa", "regrouped", "fused"} <= {row.system for row in rows}
    for row in rows:
        assert row.agrees
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.sdpa_ratio == pytest.approx(rows[0].median_ms / row.median_ms, abs=1e-3)
        assert row.gigabytes_per_second == pytest.approx(least_bytes(TINY) / row.median_ms / 1e6, rel=1e-2, abs=0.01)
        assert row.of_bandwidth == pytest.approx(row.gigabytes_per_second / 10, abs=1e-3)
    path = tmp_path / "kernels.csv"
    append(rows, path)
    append(rows, path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(rows)
    assert set(KERNEL_COLUMNS) <= set(lines[0])
    assert {line["agrees"] for line in lines} == {str(True)}
    assert set(PEER_SYSTEMS) & {line["system"] for line in lines} == {"sdpa", "regrouped"}


def fails(inputs: Inputs) -> torch.Tensor:
    raise RuntimeError("out of shared memory")


@rehearsal
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda inputs: sdpa(inputs) * 1.05, "WRONG"),
        (lambda inputs: sdpa(inputs) * float("nan"), "WRONG"),
        (fails, "broken fails on Problem(batch=1"),
    ],
)
def test_a_wrong_result_and_a_failure_are_said_and_take_no_other_along(
    run: object, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [System("sdpa", sdpa), System("broken", run), System("regrouped", regrouped)]  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "systems", lambda *_: iter(found))
    assert kernels.main(["--device", "cpu", "--seconds", "0.01"]) == 1
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert (printed.out + printed.err).count("WRONG") == (said == "WRONG")
    assert "regrouped" in printed.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 3
    assert capsys.readouterr().err.startswith("benchmarks.kernels: torch sees no NVIDIA GPU")


def test_interpreted_kernels_are_not_timed_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "INTERPRETED", type(INTERPRETED)(True))
    assert kernels.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_rehearsal_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", type(INTERPRETED)(False))
    assert kernels.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "benchmarks.kernels: a rehearsal on the CPU needs TRITON_INTERPRET=1\n"
