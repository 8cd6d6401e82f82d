"""The benchmarks, quickly: on one server that they share, with transformers in this process.

The naive Triton server alone runs as it always does: a peer in a process of its own.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import growth, measure, run
from benchmarks.compare import __main__ as compare
from benchmarks.compare import environments, ours, systems
from benchmarks.compare.process import Peer, PeerError
from benchmarks.compare.programs import protocol
from benchmarks.compare.programs.huggingface import HuggingFace
from benchmarks.fullsize import __main__ as fullsize
from benchmarks.fullsize import measure as captions
from benchmarks.rows import Row, read_rows
from blipstream.triton.server import TritonServer

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Inside:
    """transformers as a peer, in this process."""

    def __init__(self, checkpoint: str, dtype: str) -> None:
        self._answer = HuggingFace(Path(checkpoint), dtype, compiled=False).answer
        self.versions = {"transformers": "5"}

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def ask(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        return protocol._answer(self._answer, dict(job))

    def memory_bytes(self) -> int:
        return 1 << 30


@pytest.fixture(scope="module")
def naive(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A naive Triton server, started once, outside a test's time."""
    command = [sys.executable, "-m", "benchmarks.compare.programs.naive_triton", str(checkpoint), "1", "fp32"]
    with Peer(command, tmp_path_factory.mktemp("naive") / "peer.log", threads=1) as peer:
        yield peer


@pytest.fixture(autouse=True)
def _shared(server: TritonServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would start a server or a peer gets the one that runs."""

    class Lent:
        def __init__(self, *_: object, **__: object) -> None:
            self.grpc_url = server.grpc_url

        def start(self) -> TritonServer:
            return server

        def stop(self) -> None:
            pass

        def __enter__(self) -> TritonServer:
            return server

        def __exit__(self, *exc_info: object) -> None:
            pass

    def start(command: list[str], _log: Path, _threads: int) -> Any:
        _, _, program, checkpoint, _, *options = command
        if program.endswith("language"):  # CTranslate2 is not in this environment
            raise PeerError("it ended with status 1")
        if program.endswith("huggingface"):
            return Inside(checkpoint, options[0])
        return nullcontext(request.getfixturevalue("naive"))

    for module in (captions, fullsize, growth, ours, run):
        monkeypatch.setattr(module, "TritonServer", Lent)
    for module in (captions, systems):
        monkeypatch.setattr(module, "Peer", start)
    monkeypatch.setattr(environments, "python", lambda *_: sys.executable)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def assert_one_plot(folder: Path, pattern: str) -> None:
    (plot,) = folder.glob(pattern)
    with Image.open(plot) as image:
        assert image.format == "PNG"


def compare_with(checkpoint: Path, bundle: Path, folder: Path, *options: str) -> int:
    folders = ("--work", str(folder / "work"), "--results", str(folder))
    return compare.main([str(checkpoint), str(bundle), "--answers", "5", "--batches", "4", *folders, *options])


@pytest.mark.usefixtures("naive")
def test_peers_say_what_blipstream_says(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """An fp32 bundle against transformers in fp32, alone, batched and in a naive Triton server."""
    exact, naive = peers = ("transformers-fp32", "naive-triton-fp32")
    options = ("--systems", *peers, "--tasks", "features", "caption", "vqa", "--rounds", "2")
    assert compare_with(checkpoint, bundle, tmp_path, *options) == 0
    rows = rows_of(tmp_path / "compare.csv")
    tasks = [(exact, "features", 1), (exact, "caption", 1), (exact, "vqa", 4), (naive, "caption", 1), (naive, "vqa", 5)]
    assert [(row["system"], row["task"], int(row["batch"])) for row in rows] == tasks
    for row in rows:
        assert (row["reference"], row["apart"]) == (exact, "False")
        assert float(row["agreement"]) == pytest.approx(1, abs=1e-4)
        assert float(row["blipstream_agreement"]) == pytest.approx(1, abs=1e-4)
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert 0.1 < float(row["memory_gib"]) < 3
    assert "nvidia-pytriton" in rows[-1]["versions"]
    assert_one_plot(tmp_path, "compare-*.png")


def test_both_may_have_the_machine_in_turn_and_a_peer_that_fails_stops_no_other(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--systems", "ctranslate2-int8", "transformers-fp32", "--tasks", "language", "answers")
    assert compare_with(checkpoint, bundle, tmp_path, *options, "--rounds", "1", "--apart") == 1
    assert "ctranslate2-int8 failed: it ended with status 1" in capsys.readouterr().out
    (row,) = rows_of(tmp_path / "compare.csv")
    assert (row["apart"], row["task"], row["batch"], row["requests"]) == ("True", "answers", "4", "5")
    assert float(row["blipstream_agreement"]) == 1


def test_every_curve_of_growth_is_measured(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SIDES", ((100, 75), (640, 480)))
    folders = [str(checkpoint), str(bundle), "--results", str(tmp_path)]
    assert growth.main([*folders, "--max-in-flight", "2", "--max-prompt", "5", "--requests", "3"]) == 0
    rows = rows_of(tmp_path / growth.FILE)
    points = {name: [float(row["value"]) for row in rows if row["curve"] == name] for name in growth.CURVES}
    assert points == {
        **{name: [1, 2] for name in ("flight", "bulk", "known")},
        "prompt": [1, 2, 5],
        "image": [0.0075, 0.3072],
    }
    assert all(float(row["p90_ms"]) >= float(row["p50_ms"]) > 0 for row in rows)
    assert all(0 < float(row["engine_share"]) <= 1 for row in rows if float(row["request_throughput"]) > 0)
    assert_one_plot(tmp_path, "growth-*.png")

    monkeypatch.setattr(growth, "PROMPTS", (60_000,))
    with pytest.raises(RuntimeError, match=r"1 of 1 requests failed, the first: .*leave room for an answer"):
        growth.main([*folders, "--curves", "prompt", "--max-prompt", "60000"])
    assert len(rows_of(tmp_path / growth.FILE)) == len(rows)


def test_full_size_captions_beside_transformers(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "bundle"
    link.symlink_to(bundle)  # a peer's log lies beside it
    options = ("--built", "--captions", "2", "--peers", "fp32", "--results", str(tmp_path))
    assert fullsize.main(["run", str(checkpoint), str(link), "--precision", "fp32", *options]) == 0
    first, second = rows_of(tmp_path / "fullsize.csv")
    assert (first["system"], second["system"]) == ("blipstream-fp32", "transformers-fp32")
    assert (float(first["tokens_equal"]), float(second["tokens_equal"])) == (1, 1)
    ratio = float(second["caption_p50_s"]) / float(first["caption_p50_s"])
    assert float(second["caption_ratio"]) == pytest.approx(ratio, rel=0.1)


def test_stages_are_timed_and_drawn(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    assert fullsize.main(["stages", str(checkpoint), str(bundle), "--rounds", "2", "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "stages.csv")
    assert {row["stage"] for row in rows} == {"memory", "vision_encoder", "qformer", "prefill", "step"}
    steps = [row for row in rows if row["stage"] == "step"]
    assert [int(row["rows"]) for row in steps] == [1, 2]
    assert all(0 < float(row["min_ms"]) <= float(row["p50_ms"]) <= float(row["max_ms"]) for row in rows)
    assert all(float(row["bandwidth_share"]) > 0 for row in steps)
    assert_one_plot(tmp_path, "stages-*.png")


def test_further_questions_and_what_the_server_adds(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    assert fullsize.main(["questions", str(checkpoint), str(bundle), "--images", "2", "--results", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path / "questions.csv")
    first, second = float(row["first_p50_s"]), float(row["second_p50_s"])
    assert float(row["second_ratio"]) == pytest.approx(first / second, rel=0.02)
    assert float(row["overhead"]) > 0, "the engines cannot have run for longer than the client has waited"
    assert row["tritonserver"]
    assert row["precision"] == "fp32/fp32/fp32"


def test_make_bench(checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CONCURRENCIES", (1, 2))
    options = ("--bundle", str(bundle), "--checkpoint", str(checkpoint), "--results", str(tmp_path))
    assert run.main([*options, "--requests", "3", "--rounds", "1"]) == 0
    rows = read_rows(tmp_path / "serving.csv", Row)
    loads = [("distinct", 1), ("distinct", 2), ("repeated", 2)]
    assert [(row.workload, row.concurrency, row.system) for row in rows] == [
        (*load, system) for load in loads for system in ("blipstream", *run.PEERS)
    ]
    for row in rows:
        assert row.outputs_equal == 1 or row.system.startswith("transformers-batch"), (
            "which pads, as random weights tell"
        )
        assert row.request_throughput > 0
        assert 0 < row.time_to_first_token_p50_ms <= row.request_latency_p50_ms <= row.request_latency_p95_ms
    for name in ("distinct", "repeated"):
        assert_one_plot(tmp_path, f"serving-{name}.png")
