"""Figures, reports and what the command line says of a workload."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from blipstream.bench.figures import Figures, figures_of, parse_limits, plain
from blipstream.bench.load import Record
from blipstream.bench.meter import ModelTotals, Reading
from blipstream.bench.outputs import append_csv, draw, write_json
from blipstream.bench.report import Result, show
from blipstream.bench.runner import Load, make_loads
from blipstream.bench.workload import Lengths, Sizes, Workload
from blipstream.errors import InvalidRequestError

RECORDS = [
    Record(10.0, 11.0, [(10.2, 1), (10.4, 1), (11.0, 2)], asked=5),
    Record(10.5, 12.0, [(12.0, 5)]),
    Record(10.5, 10.6, [], "refused"),
    Record(10.5, 10.6, [], "refused"),
    Record(10.5, 10.6, []),
]


def test_figures() -> None:
    found = figures_of(RECORDS, {"ttft": 300.0})
    assert (found.duration, found.completed, found.failed, found.shortened) == (2.0, 2, 3, 1)
    assert (found.request_throughput, found.output_throughput, found.request_goodput) == (1.0, 4.5, 0.5)
    assert found.errors == {"refused": 2, "the answer had no tokens": 1}
    latencies = found.latencies
    assert latencies["p50_ttft_ms"] == pytest.approx((200 + 1500) / 2)
    assert latencies["mean_e2el_ms"] == pytest.approx(1250)
    assert latencies["mean_tpot_ms"] == latencies["p99_tpot_ms"] == pytest.approx(800 / 3)  # of the first alone
    assert latencies["mean_itl_ms"] == pytest.approx((200 + 300 + 300) / 3)


def test_goodput_asks_for_every_limit_and_forgives_what_there_is_not() -> None:
    assert figures_of(RECORDS, {"ttft": 300.0, "e2el": 999.0}).request_goodput == 0
    assert figures_of(RECORDS, {"tpot": 300.0}).request_goodput == 1.0  # the second came at once
    assert math.isnan(figures_of(RECORDS).request_goodput)


def test_a_run_in_which_all_fail_has_no_latencies() -> None:
    found = figures_of(RECORDS[2:])
    assert found.completed == 0
    assert all(math.isnan(value) for value in found.latencies.values())


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-3", "ttft:nan", "ttft:inf", "itl:3"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="NAME:MILLISECONDS"):
        parse_limits([text])
    assert parse_limits(["ttft:5", "e2el:1e3"]) == {"ttft": 5, "e2el": 1000}


def test_loads() -> None:
    assert make_loads([], []) == [Load(concurrency=1)]
    assert make_loads([1, 8], []) == [Load(1), Load(8)]
    assert [str(load) for load in make_loads([1, 8], [])] == ["1 client", "8 clients"]
    assert [str(load) for load in make_loads([], [0.5])] == ["0.5 a second"]
    with pytest.raises(InvalidRequestError, match="not both"):
        make_loads([1], [1.0])
    for rate in (0.0, -1.0, 1e-300, 1e9, math.nan, math.inf):
        with pytest.raises(InvalidRequestError, match=r"0\.001 to 1000000"):
            make_loads([], [rate])


def results() -> list[Result]:
    setting = {"url": "here", "requests": 5, "concurrency": 2, "request_rate": 0.0}
    model = {"inferences": 123456, "mean_batch": 3.123, "mean_queue_ms": 12345.678, "mean_compute_ms": 0.031}
    server = {"models": {"vision_encoder": model}, "counters": {"requests": 5, "prompt_tokens": 1234567.0}}
    return [
        Result("2 clients", setting, figures_of(RECORDS), server),
        Result("4 clients", {**setting, "concurrency": 4}, figures_of(RECORDS[2:])),
    ]


def test_reports(tmp_path: Path) -> None:
    write_json(tmp_path / "runs.json", results())
    first, second = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert first["server"] == results()[0].server
    assert first["errors"]["refused"] == 2
    assert (first["completed"], first["request_goodput"], second["p50_ttft_ms"]) == (2, None, None)
    for _ in range(2):
        append_csv(tmp_path / "runs.csv", results())
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["concurrency"] for row in rows] == ["2", "4", "2", "4"]
    assert float(rows[0]["output_throughput"]) == 4.5
    for text, fault in (("url,other\n", "other columns"), ((tmp_path / "runs.csv").read_text()[:-1], "whole line")):
        (tmp_path / "runs.csv").write_text(text)
        with pytest.raises(InvalidRequestError, match=fault):
            append_csv(tmp_path / "runs.csv", results())
    draw(tmp_path / "runs.png", results())
    with Image.open(tmp_path / "runs.png") as plot:
        assert plot.size[0] > 500


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"fault {number}": number for number in range(1, 9)}
    lost = Result("the last", results()[0].setting, dataclasses.replace(figures_of(RECORDS), errors=many))
    show(Console(width=20), [*results(), dataclasses.replace(lost, server={"restarted": True})])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    said = " ".join(shown.split())
    for text in (
        "2 clients 2 3 1 4.50 -",
        "2 clients 850 / 1487 266.7 / 266.7",
        "2 clients vision_encoder 123456 3.12 12346 0.03",
        "2 clients: the server counted requests 5, prompt_tokens 1234567",
        "2 clients: 2 failed: refused",
        "the last: the server was restarted meanwhile",
        "the last: 8 failed: fault 8",
        "the last: 6 failed in other ways",
    ):
        assert text in said
    assert "fault 3" not in said


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (1254.6, "1250"), (2e6, "2000000"), (0.4, "0.4"), (0.0012349, "0.00123")]
)
def test_numbers_have_no_exponent(value: float, expected: str) -> None:
    assert plain(value) == expected


def test_figures_have_columns_for_all_that_there_is() -> None:
    columns = figures_of(RECORDS).flat()
    assert {"p99_itl_ms", "mean_tpot_ms", "duration", "failed"} <= set(columns)
    assert set(columns) >= {name for name in Figures.__dataclass_fields__ if name not in ("latencies", "errors")}


def test_what_a_server_has_counted_meanwhile() -> None:
    idle = ModelTotals(1, 1, 1, 1)
    before = Reading({"vit": ModelTotals(10, 5, 100, 1000), "idle": idle}, {"requests": 3})
    after = Reading({"vit": ModelTotals(16, 7, 6_000_100, 12_001_000), "idle": idle}, {"requests": 5})
    found = after.since(before)
    assert found["models"] == {
        "vit": {"inferences": 6, "mean_batch": 3.0, "mean_queue_ms": 1.0, "mean_compute_ms": 2.0}
    }
    assert found["counters"] == {"requests": 2}
    assert before.since(after) == {"restarted": True}


# --- the workload ----------------------------------------------------------------------------------------------------


def test_a_workload_is_drawn_from_its_seed() -> None:
    workload = Workload(3, Sizes.parse("64x48-128x96"), Lengths(6, 2), Lengths(10, 4), seed=7)
    asked = workload.requests(12)
    assert asked == workload.requests(12)
    assert {request.image for request in asked}.isdisjoint(request.image for request in workload.requests(12, part=1))
    assert len({request.image for request in asked}) == 3
    assert asked[0].image == asked[3].image != asked[1].image
    assert len({len(request.prompt.split()) for request in asked}) > 1
    assert min(request.output_tokens for request in asked) >= 1
    for request in asked:
        with Image.open(io.BytesIO(request.image)) as image:
            assert image.format == "JPEG"
            assert 64 <= image.width <= 128
            assert image.width * 3 == pytest.approx(image.height * 4, abs=4)


def test_pictures_are_neither_flat_nor_noise() -> None:
    (request,) = Workload(1, Sizes.parse("640x480"), None, Lengths(1), seed=1).requests(1)
    assert request.prompt == ""
    with Image.open(io.BytesIO(request.image)) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    assert pixels.std() > 15
    neighbours = np.corrcoef(pixels[:, :-1].ravel(), pixels[:, 1:].ravel())[0, 1]
    assert 0.9 < neighbours < 0.9999
    assert 0.02 < len(request.image) / pixels.size < 1, "bytes a pixel, as photographs have them"


@pytest.mark.parametrize("text", ["", "640", "640x", "0x480", "640x480-320x960", "640x480-", "20000x20000", "axb"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="image sizes must be"):
        Sizes.parse(text)


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "3:-1", "3:x", "nan", "3:nan", "3:inf", "1e300", "3:1e9"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="output tokens must be"):
        Lengths.parse(text, "output tokens")


def test_lengths_have_their_mean_and_their_spread() -> None:
    drawn = Lengths.parse("20:5", "output tokens").draw(np.random.default_rng(0), 2000)
    assert np.mean(drawn) == pytest.approx(20, abs=0.5)
    assert np.std(drawn) == pytest.approx(5, abs=0.5)
    assert set(Lengths(4).draw(np.random.default_rng(0), 9)) == {4}
