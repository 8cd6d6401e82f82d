"""``blipstream bench`` against the real server."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blipstream.cli import app
from blipstream.triton.server import TritonServer

pytestmark = pytest.mark.server


def test_a_closed_loop_with_everything_that_is_written(server: TritonServer, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("runs.json", "runs.csv", "runs.png")]
    arguments = [
        *("--url", server.grpc_url, "--concurrency", "1", "--concurrency", "3", "--requests", "9", "--warmup", "2"),
        *("--image-size", "64x48-96x96", "--output-tokens", "6:2", "--prompt-words", "3:1", "--images", "4"),
        *("--goodput", "e2el:60000", "--metrics-url", server.metrics_url),
        *("--json", str(files[0]), "--csv", str(files[1]), "--plot", str(files[2])),
    ]
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    runs = json.loads(files[0].read_text())["runs"]
    for run, clients in zip(runs, ("1 client", "3 clients"), strict=True):
        assert (run["concurrency"], run["completed"], run["failed"]) == (int(clients[0]), 9, 0)
        assert 0 < run["p50_ttft_ms"] <= run["p50_e2el_ms"] <= run["p99_e2el_ms"]
        assert run["request_goodput"] == run["request_throughput"] > 0
        assert run["output_throughput"] > run["request_throughput"]
        models, counters = run["server"]["models"], run["server"]["counters"]
        assert (models["blip2"]["inferences"], models["vision_encoder"]["inferences"]) == (9, 4)
        assert models["vision_encoder"]["mean_batch"] >= 1
        assert counters["requests"] == 9, "all that came, and not the warm-up"
        assert {"generated_tokens", "feature_cache_hits", "prefix_cache_hits"} <= set(counters)
        assert f"{clients}: the server counted" in done.stdout
        assert done.stdout.count(f"{clients}  vision_encoder  ") == 1
    with files[1].open() as file:
        assert [row["concurrency"] for row in csv.DictReader(file)] == ["1", "3"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
