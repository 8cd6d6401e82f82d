"""The comparison with peers, on a real server, with the peers' programs in this environment."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks.compare import environments
from benchmarks.compare.__main__ import main

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "python", lambda *_: Path(sys.executable))


def compare(checkpoint: Path, bundle: Path, folder: Path, *options: str) -> list[dict[str, str]]:
    """The rows of a run."""
    folders = ("--work", str(folder / "work"), "--results", str(folder))
    assert main([str(checkpoint), str(bundle), "--answers", "5", "--batches", "4", *folders, *options]) == 0
    with (folder / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def test_peers_say_what_blipstream_says(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """An fp32 bundle against transformers in fp32, alone, batched and in a naive Triton server."""
    exact, naive = systems = ("transformers-fp32", "naive-triton-fp32")
    tasks = ("features", "caption", "vqa")
    rows = compare(checkpoint, bundle, tmp_path, "--systems", *systems, "--tasks", *tasks, "--rounds", "2")
    found = {(row["system"], row["task"], int(row["batch"])): row for row in rows}
    alone = [(exact, "features", 1), (exact, "caption", 1), (exact, "vqa", 4)]
    assert list(found) == [*alone, (naive, "caption", 1), (naive, "vqa", 5)]
    for row in rows:
        assert (row["reference"], row["apart"]) == (exact, "False")
        assert float(row["agreement"]) == pytest.approx(1, abs=1e-4)
        assert float(row["blipstream_agreement"]) == pytest.approx(1, abs=1e-4)
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert 0.1 < float(row["memory_gib"]) < 3
        assert 0.1 < float(row["blipstream_memory_gib"]) < 3
    assert "transformers 5" in found[exact, "caption", 1]["versions"]
    (plot,) = tmp_path.glob("compare-*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_both_may_have_the_machine_in_turn(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    options = ("--systems", "transformers-fp32", "--tasks", "answers", "--rounds", "1", "--apart")
    (row,) = compare(checkpoint, bundle, tmp_path, *options)
    assert (row["apart"], row["task"], row["batch"], row["requests"]) == ("True", "answers", "4", "5")
    assert float(row["blipstream_agreement"]) == 1


def test_a_peer_that_fails_does_not_stop_the_others(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CTranslate2 is not in this environment, so that its process ends before it is ready."""
    folders = ("--work", str(tmp_path / "work"), "--results", str(tmp_path), "--rounds", "1")
    systems = ("--systems", "ctranslate2-int8", "transformers-fp32", "--tasks", "language", "features")
    assert main([str(checkpoint), str(bundle), *systems, *folders]) == 1
    assert "ctranslate2-int8 failed: it ended with status 1" in capsys.readouterr().out
    with (tmp_path / "compare.csv").open() as file:
        assert [row["system"] for row in csv.DictReader(file)] == ["transformers-fp32"]
