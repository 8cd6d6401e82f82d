"""``blipstream plan`` on bundles of random checkpoints: it measures them for real."""

from __future__ import annotations

from pathlib import Path

import pytest
from blipstream_export.build import BuildOptions, BuildResult
from typer.testing import CliRunner

from blipstream.cli import app
from blipstream.planning.stages import StageTimes
from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.instructblip import save_instructblip

runner = CliRunner()


def test_a_bundle_is_measured_and_planned_with(random_bundle: BuildResult, tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    measured = runner.invoke(app, ["plan", str(random_bundle.bundle), "--request-rate", "3", "--stages", str(file)])
    assert measured.exit_code == 0, measured.output
    assert "3 requests a second need" in measured.output
    stages = StageTimes.load(file)
    assert [rows for rows, _ in stages.step] == [1, 2, 4]
    assert all(seconds > 0 for curve in (stages.images, stages.prefill, stages.step) for _, seconds in curve)
    assert stages.overlap > 0
    assert stages.max_sequences == 5
    assert 0 < stages.fastest <= 1 <= stages.slowest
    assert (stages.max_prompt_tokens, stages.answer_apart) == (stages.max_tokens - 1, False)
    again = runner.invoke(app, ["plan", "--stages", str(file), "--request-rate", "3"])
    assert again.exit_code == 0
    assert again.output.splitlines()[-1] == measured.output.splitlines()[-1]


@pytest.fixture(scope="module")
def instructed() -> Path:
    return bundle_of(checkpoint_of(save_instructblip, "llama", seed=3), BuildOptions(max_sequences=5))


def test_a_q_former_that_reads_instructions_is_given_one(instructed: Path) -> None:
    found = runner.invoke(app, ["plan", str(instructed)])
    assert found.exit_code == 0, found.output
