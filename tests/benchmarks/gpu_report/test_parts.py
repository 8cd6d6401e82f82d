"""The GPU report: choice of parts, small real processes as parts, the command; and a rehearsal on the CPU."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from typer.main import get_command

from benchmarks.fullsize import measure as fullsize
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, timing
from benchmarks.gpu.environment import Environment, parse_smi
from benchmarks.gpu.parts import NO_GPU, Part, Plan, make_parts, reason_to_skip
from benchmarks.gpu.rows import CAPTION, STEP, read_rows
from benchmarks.gpu.runner import Outcome, run_part
from blipstream.cli import app
from tests.benchmarks.gpu_report.machines import DATA_CENTRE, NOTHING
from tests.support.bundles import bundle_of
from tests.support.variants import variant_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]


# --- the machine -------------------------------------------------------------------------------------------------


def test_nvidia_smi_is_read() -> None:
    line = "NVIDIA H100 80GB HBM3, 615.61, 81559, 9.0, 1755, 2619, 1980, 2619, 700.00"
    assert parse_smi(line) == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "driver": "615.61",
        "gpu_memory": 81559 << 20,
        "compute_capability": "9.0",
        "clocks": {
            "clocks.sm": "1755",
            "clocks.mem": "2619",
            "clocks.max.sm": "1980",
            "clocks.max.mem": "2619",
            "power.limit": "700.00",
        },
    }


def test_what_nvidia_smi_does_not_know_is_left_out() -> None:
    found = parse_smi("Orin (nvgpu), 540.4.0, [N/A], 8.7, [N/A], [N/A], [N/A], [N/A], [Not Supported]")
    assert found == {"gpu": "Orin (nvgpu)", "driver": "540.4.0", "compute_capability": "8.7"}
    assert parse_smi("") == parse_smi("No devices were found") == {}


@pytest.mark.parametrize("environment", [NOTHING, DATA_CENTRE])
def test_an_environment_survives_its_file(environment: Environment, tmp_path: Path) -> None:
    environment.write(tmp_path / "environment.json")
    assert Environment.read(tmp_path / "environment.json") == environment


# --- which parts -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_NEEDED_DISK", 0)


PLAN = Plan(Path("report"), Path("work"))
TINY = dataclasses.replace(PLAN, checkpoint=Path("tiny"))
SMALL = {"gpu_memory": 8 << 30}


def reasons(environment: Environment, plan: Plan = PLAN) -> dict[str, str | None]:
    """Why each part is skipped, if those before it are done."""
    all_parts = make_parts(plan)
    done = {part.name: Outcome("done") for part in all_parts}
    return {part.name: reason_to_skip(part, environment, plan, done) for part in all_parts}


def test_without_a_gpu_every_part_is_skipped_for_that_and_in_a_data_centre_none_is() -> None:
    assert set(reasons(NOTHING).values()) == {NO_GPU}
    assert set(reasons(DATA_CENTRE).values()) == {None}
    assert "checkpoint" not in reasons(DATA_CENTRE, TINY)


@pytest.mark.parametrize(
    ("machine", "plan", "expected"),
    [
        ({"torch_cuda": None, "torch_sees_gpu": False}, PLAN, {"limits": r"^torch 2\.13\.0 is built without CUDA: "}),
        ({"torch_sees_gpu": False}, PLAN, {"limits": "does not see the GPU"}),
        (
            {"tensorrt": None, "providers": ("CPUExecutionProvider",)},
            PLAN,
            {
                **dict.fromkeys(("tensorrt", "tensorrt-build"), r"\.\[tensorrt\]"),
                "onnxruntime-cuda": "CUDAExecutionProvider",
                "transformers-eager": None,
            },
        ),
        (SMALL, PLAN, {"checkpoint": r"8\.0 GiB", "limits": None}),
        (SMALL, TINY, {"tensorrt": None}),
    ],
)
def test_what_a_machine_lacks_skips_the_parts_that_need_it(
    machine: dict[str, Any], plan: Plan, expected: dict[str, str | None]
) -> None:
    found = reasons(dataclasses.replace(DATA_CENTRE, **machine), plan)
    for name, reason in expected.items():
        assert found[name] is None if reason is None else re.search(reason, found[name] or ""), name


def test_the_kernels_leave_their_rows_where_the_report_looks() -> None:
    (part,) = [part for part in make_parts(PLAN) if part.name == parts.KERNELS]
    assert part.command[-2:] == ("--rows", str(PLAN.folder(parts.KERNELS) / parts.KERNELS_FILE))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_NEEDED_DISK", 1 << 60)
    found = reasons(DATA_CENTRE, Plan(tmp_path, tmp_path / "missing" / "work"))
    assert str(found["checkpoint"]).startswith(f"{tmp_path} has ")
    assert found["limits"] is None


def test_a_part_waits_for_those_before_it() -> None:
    part = next(part for part in make_parts(PLAN) if part.name == "tensorrt")
    assert reason_to_skip(part, DATA_CENTRE, PLAN, {}) == "it comes after tensorrt-build, which is not run yet"
    failed = {"tensorrt-build": Outcome("timed out", "it was killed after 1 s")}
    assert reason_to_skip(part, DATA_CENTRE, PLAN, failed) == "it comes after tensorrt-build, which is timed out"


def test_the_first_parts_are_short() -> None:
    """Something useful is there within five minutes: the first part's own limit is below that."""
    assert make_parts(PLAN)[0].limit <= 300


# --- running them ------------------------------------------------------------------------------------------------


def script(name: str, code: str, limit: float = 30, after: tuple[str, ...] = ()) -> Part:
    return Part(name, f"the part {name}", ("-c", code), limit, after=after)


def run(part: Part, folder: Path) -> Outcome:
    return run_part(part.full_command, folder, part.limit, working=REPOSITORY)


@pytest.mark.parametrize(
    ("code", "status", "reason", "last"),
    [
        ("print('said')", "done", "", "said"),
        ("for i in range(1000): print('line', i)\nraise ValueError('why')", "failed", "status 1", "ValueError: why"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "signal SIGSEGV", ""),
    ],
)
def test_how_a_part_ends_and_its_last_lines(code: str, status: str, reason: str, last: str, tmp_path: Path) -> None:
    outcome = run(script("part", code), tmp_path / "part")
    assert (outcome.status, outcome.reason) == (status, reason and f"it ended with {reason}")
    log = (tmp_path / "part" / "output.log").read_text()
    assert log.strip().endswith(last)
    assert outcome.tail == ("" if status == "done" else "\n".join(log.splitlines()[-30:]))
    assert Outcome.read(tmp_path / "part") == outcome


def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "print('before it hung')\n"
        "time.sleep(600)\n"
    )
    started = time.monotonic()
    outcome = run(script("hang", code, limit=3), tmp_path / "hang")
    assert time.monotonic() - started < 30
    assert (outcome.status, outcome.reason) == ("timed out", "it was killed after 3 s")
    assert "before it hung" in outcome.tail
    assert not is_running(int(child.read_text()))


def is_running(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.05)
    return True


def test_a_part_finds_no_leavings_of_its_last_run(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "rows.csv").write_text("old")
    run(script("part", "pass"), folder)
    assert not (folder / "rows.csv").exists()


def counting(tmp_path: Path, name: str, code: str = "") -> Part:
    """A part that writes a line whenever it runs."""
    return script(name, f"open({str(tmp_path / name)!r}, 'a').write('ran\\n')\n{code}")


def times_run(tmp_path: Path, *names: str) -> list[int]:
    return [len((tmp_path / name).read_text().splitlines()) if (tmp_path / name).exists() else 0 for name in names]


def test_a_failing_part_stops_no_other_and_a_second_run_resumes(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "report", tmp_path / "work")
    plan.report.mkdir()
    repaired = tmp_path / "repaired"
    fragile = f"import pathlib\nassert pathlib.Path({str(repaired)!r}).exists(), 'not repaired'"
    behind = dataclasses.replace(counting(tmp_path, "behind"), after=("fragile",))
    four = (counting(tmp_path, "first"), counting(tmp_path, "fragile", fragile), behind, counting(tmp_path, "last"))

    outcomes = run_with(plan, four)
    assert [outcome.status for outcome in outcomes.values()] == ["done", "failed", "skipped", "done"]
    text = (plan.report / "report.md").read_text()
    assert "AssertionError: not repaired" in text
    assert "skipped: it comes after fragile, which is failed" in text

    repaired.touch()
    outcomes = run_with(plan, four)
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    assert times_run(tmp_path, "first", "fragile", "behind", "last") == [1, 2, 1, 1]
    assert "AssertionError" not in (plan.report / "report.md").read_text()

    run_with(plan, four, only=["last"])
    assert times_run(tmp_path, "first", "fragile", "behind", "last") == [1, 2, 1, 2]


def run_with(plan: Plan, some: Sequence[Part], only: Sequence[str] = ()) -> dict[str, Outcome]:
    return command.run_parts(plan, some, DATA_CENTRE, only=only)


def test_the_report_is_there_before_the_second_part_runs(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "report", tmp_path / "work")
    plan.report.mkdir()
    report = plan.report / "report.md"
    looks = f"import pathlib\nassert '| first | the part first | done |' in pathlib.Path({str(report)!r}).read_text()"
    outcomes = run_with(plan, (counting(tmp_path, "first"), script("second", looks)))
    assert outcomes["second"].status == "done", outcomes["second"].tail


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "probe", lambda _folder: NOTHING)


def test_without_a_gpu_the_report_names_every_part(
    tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--report", str(tmp_path)]) == command.NO_GPU
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "There is no NVIDIA GPU on this machine, so every part was skipped."
    assert len(said) == 2
    text = (tmp_path / "report.md").read_text()
    for part in make_parts(Plan(tmp_path, tmp_path)):
        assert f"| {part.name} | {part.title} | skipped: {NO_GPU} |" in text
    assert text.count("not measured because") == 7
    assert Environment.read(tmp_path / "environment.json") == NOTHING


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "lunch"], "there is no part lunch; there are limits, kernel-tests"),
        (["--device", "cpu"], "needs --checkpoint FOLDER"),
    ],
)
def test_misuse_is_said(
    arguments: list[str], said: str, tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--report", str(tmp_path / "report"), *arguments]) == command.MISUSED
    assert said in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_reports_of_two_machines_do_not_mix(tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    DATA_CENTRE.write(tmp_path / "environment.json")
    assert command.main(["--report", str(tmp_path)]) == command.MISUSED
    assert "holds a report of NVIDIA Some GPU" in capsys.readouterr().err
    assert command.main(["--report", str(tmp_path), "--fresh"]) == command.NO_GPU


def test_the_probe_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = command.probe(tmp_path / "environment")
    assert environment.versions["torch"]
    assert "CPUExecutionProvider" in environment.providers


# --- for real, on the CPU ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> tuple[Path, Path]:
    """A checkpoint, and its bundle with as many slots as are measured."""
    checkpoint = variant_checkpoint("opt")
    return checkpoint, bundle_of(checkpoint)


@pytest.mark.slow
def test_a_rehearsal_measures_a_checkpoint(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code that runs on a GPU, on the CPU, the parts in this process: transformers eager and compiled, Blipstream
    on ONNX Runtime."""

    def build(command: Sequence[object], **_: object) -> SimpleNamespace:
        """Read the command line as ``blipstream build`` does."""
        options = get_command(app).commands["build"].make_context("build", list(map(str, command[2:]))).params
        options["output"].parent.mkdir(parents=True)
        options["output"].symlink_to(built[1])
        return SimpleNamespace(stdout="built")

    def run_here(arguments: Sequence[str], folder: Path, *_: object, **__: object) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        _, _, module, *options = arguments
        with monkeypatch.context() as patch, warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", [module, *options])
            runpy.run_module(module, run_name="__main__")
        outcome = Outcome("done")
        outcome.write(folder)
        return outcome

    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(timing, "LEAST", 1)
    monkeypatch.setattr(fullsize, "subprocess", SimpleNamespace(run=build, PIPE=None))
    monkeypatch.setattr(command, "run_part", run_here)
    report = tmp_path / "report"
    options = ["--device=cpu", "--dtype=fp32", f"--checkpoint={built[0]}", "--seconds=0"]
    arguments = [*options, "--compile-backend=eager", f"--report={report}", f"--work={tmp_path / 'work'}"]
    assert command.main(arguments) == 0
    text = (report / "report.md").read_text()
    assert "onnxruntime 100.0%, transformers-compiled 100.0%" in text, "all three generate the same tokens"
    rows = read_rows(report / "rows.csv")
    captions = {(row.system, row.batch) for row in rows if row.what == CAPTION}
    systems = ("transformers-eager", "transformers-compiled", "blipstream-onnxruntime")
    assert captions == {(system, batch) for system in systems for batch in (1, 8)}
    assert {row.batch for row in rows if row.what == STEP} == {1, 2, 4, 8, 16}
    assert "| onnxruntime | decode step | 1 | bandwidth |" in text
    assert {path.name for path in report.glob("*.png")} == {"caption.png", "decode-step.png", "prefill.png"}
