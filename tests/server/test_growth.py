"""The curves of a request's cost, on a real server."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import growth

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_every_curve_is_measured(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SIDES", ((100, 75), (640, 480)))
    arguments = [str(checkpoint), str(bundle), "--max-in-flight", "4", "--max-prompt", "20", "--results", str(tmp_path)]
    assert growth.main(arguments) == 0
    with (tmp_path / growth.FILE).open() as file:
        rows = list(csv.DictReader(file))
    points = {name: [float(row["value"]) for row in rows if row["curve"] == name] for name in growth.CURVES}
    assert points == {
        **{name: [1, 2, 4] for name in ("flight", "bulk", "known")},
        "prompt": [1, 2, 5, 10, 20],
        "image": [0.0075, 0.3072],
    }
    assert all(float(row["p90_ms"]) >= float(row["p50_ms"]) > 0 for row in rows)
    assert all(0 < float(row["engine_share"]) <= 1 for row in rows if float(row["request_throughput"]) > 0)
    (plot,) = tmp_path.glob("growth-*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_failing_request_ends_the_run(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of a server that refuses would be figures of nothing."""
    monkeypatch.setattr(growth, "PROMPTS", (60_000,))
    arguments = [
        str(checkpoint),
        str(bundle),
        "--curves",
        "prompt",
        "--max-prompt",
        "60000",
        "--results",
        str(tmp_path),
    ]
    with pytest.raises(RuntimeError, match=r"1 of 1 requests failed, the first: .*leave room for an answer"):
        growth.main(arguments)
    assert not list(tmp_path.iterdir())
