"""The comparison with peers, on a real server, with the peers' programs in this environment."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks.compare import environments
from benchmarks.compare.__main__ import main

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_peers_say_what_blipstream_says(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp32 bundle against transformers in fp32, sequential, batched and in a naive Triton server."""
    monkeypatch.setattr(environments, "python", lambda *_: Path(sys.executable))
    systems = ("transformers-fp32", "naive-triton-bf16")
    folders = ("--work", str(tmp_path / "work"), "--results", str(tmp_path))
    arguments = [str(checkpoint), str(bundle), "--systems", *systems, "--rounds", "2", "--answers", "5", *folders]
    assert main([*arguments, "--tasks", "features", "caption", "answers"]) == 0
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["system"], row["task"], int(row["batch"])): row for row in rows}
    exact, naive = systems
    answers = [(exact, "answers", batch) for batch in (1, 4, 16)]
    assert list(found) == [
        (exact, "features", 1),
        (exact, "caption", 1),
        *answers,
        (naive, "caption", 1),
        (naive, "answers", 5),
    ]
    for row in rows:
        assert row["reference"] == exact
        assert float(row["blipstream_agreement"]) == pytest.approx(1, abs=1e-4)
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert float(row["memory_gib"]) > 0.1
        assert 0.1 < float(row["blipstream_memory_gib"]) < 2
    assert all(float(found[key]["agreement"]) == 1 for key in answers), "batches change no token"
    assert "transformers 5" in found[exact, "caption", 1]["versions"]
