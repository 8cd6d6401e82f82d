"""``blipstream bench`` against the real server."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blipstream.triton.server import TritonServer

pytestmark = pytest.mark.server

SMALL = ("--image-size", "64x48-96x96", "--output-tokens", "6:2", "--warmup", "2")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("blipstream")
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([program, "bench", *arguments], capture_output=True, text=True, timeout=240, env=environment)


def test_a_closed_loop_with_everything_that_is_written(server: TritonServer, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("runs.json", "runs.csv", "runs.png")]
    done = bench(
        *("--url", server.grpc_url, "--concurrency", "1", "--concurrency", "3", "--requests", "9", *SMALL),
        *("--prompt-words", "3:1", "--images", "4", "--goodput", "e2el:60000", "--metrics-url", server.metrics_url),
        *("--json", str(files[0]), "--csv", str(files[1]), "--plot", str(files[2])),
    )
    assert done.returncode == 0, done.stderr
    assert "3 clients" in done.stdout
    for run, clients in zip(json.loads(files[0].read_text())["runs"], (1, 3), strict=True):
        assert (run["concurrency"], run["completed"], run["failed"]) == (clients, 9, 0)
        assert 0 < run["p50_ttft_ms"] <= run["p50_e2el_ms"] <= run["p99_e2el_ms"]
        assert run["request_goodput"] == run["request_throughput"] > 0
        assert run["output_throughput"] > run["request_throughput"]
        models, counters = run["server"]["models"], run["server"]["counters"]
        assert models["blip2"]["inferences"] == 9
        assert models["vision_encoder"]["inferences"] == 4
        assert models["vision_encoder"]["mean_batch"] >= 1
        assert {"generated_tokens", "feature_cache_hits", "prefix_cache_hits"} <= set(counters)
    with files[1].open() as file:
        assert [row["concurrency"] for row in csv.DictReader(file)] == ["1", "3"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_an_open_loop(server: TritonServer, tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    done = bench("--url", server.grpc_url, "--request-rate", "50", "--requests", "20", *SMALL, "--json", str(file))
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(file.read_text())["runs"]
    assert (run["completed"], run["concurrency"], run["request_rate"]) == (20, 0, 50)


def test_requests_that_fail_are_counted_and_a_run_of_them_alone_fails(server: TritonServer) -> None:
    done = bench("--url", server.grpc_url, "--model", "nobody", "--requests", "3", *SMALL)
    assert done.returncode == 1
    assert "3 failed" in done.stdout
    assert "nobody" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--url", "127.0.0.1:1"), "gives no statistics"),
        (("--protocol", "carrier-pigeon"), "must be kserve or openai"),
        (("--concurrency", "1", "--request-rate", "1"), "not both"),
        (("--goodput", "speed:1"), "NAME:MILLISECONDS"),
        (("--metrics-url", "http://127.0.0.1:1/metrics"), "cannot be read"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(server: TritonServer, arguments: tuple[str], fault: str) -> None:
    url = () if "--url" in arguments else ("--url", server.grpc_url)
    done = bench(*url, *arguments, "--requests", "1", *SMALL)
    assert done.returncode == 1
    assert fault in done.stderr
    assert "Traceback" not in done.stderr
