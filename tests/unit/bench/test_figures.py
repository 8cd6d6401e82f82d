"""Figures, reports and what the command line says of a workload."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipstream.bench.figures import Figures, figures_of, parse_limits
from blipstream.bench.load import Record
from blipstream.bench.meter import ModelTotals, Reading
from blipstream.bench.report import Result, append_csv, draw, make_table, write_json
from blipstream.bench.runner import Load, make_loads
from blipstream.bench.workload import Lengths, Sizes, Workload
from blipstream.errors import InvalidRequestError

RECORDS = [
    Record(10.0, 11.0, [(10.2, 1), (10.4, 1), (11.0, 2)]),
    Record(10.5, 12.0, [(12.0, 5)]),
    Record(10.5, 10.6, [], "refused"),
    Record(10.5, 10.6, [], "refused"),
    Record(10.5, 10.6, []),
]


def test_figures() -> None:
    found = figures_of(RECORDS, {"ttft": 300.0})
    assert (found.duration, found.completed, found.failed) == (2.0, 2, 3)
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


@pytest.mark.parametrize("text", ["", "ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-3", "ttft:nan", "itl:3"])
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
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidRequestError, match="above 0"):
            make_loads([], [rate])


def results() -> list[Result]:
    setting = {"url": "here", "concurrency": 2, "request_rate": 0.0}
    return [
        Result("2 clients", setting, figures_of(RECORDS), {"counters": {"requests": 5}}),
        Result("4 clients", {**setting, "concurrency": 4}, figures_of(RECORDS[2:])),
    ]


def test_reports(tmp_path: Path) -> None:
    write_json(tmp_path / "runs.json", results())
    first, second = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert first["server"] == {"counters": {"requests": 5}}
    assert first["errors"]["refused"] == 2
    assert (first["completed"], first["request_goodput"], second["p50_ttft_ms"]) == (2, None, None)
    for _ in range(2):
        append_csv(tmp_path / "runs.csv", results())
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["concurrency"] for row in rows] == ["2", "4", "2", "4"]
    assert float(rows[0]["output_throughput"]) == 4.5
    (tmp_path / "runs.csv").write_text("url,other\n")
    with pytest.raises(InvalidRequestError, match="other columns"):
        append_csv(tmp_path / "runs.csv", results())
    draw(tmp_path / "runs.png", results())
    with Image.open(tmp_path / "runs.png") as plot:
        assert plot.size[0] > 500
    assert make_table(results()).row_count == 2


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


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "3:-1", "3:x", "nan", "3:nan", "3:inf"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="output tokens must be"):
        Lengths.parse(text, "output tokens")


def test_lengths_have_their_mean_and_their_spread() -> None:
    drawn = Lengths.parse("20:5", "output tokens").draw(np.random.default_rng(0), 2000)
    assert np.mean(drawn) == pytest.approx(20, abs=0.5)
    assert np.std(drawn) == pytest.approx(5, abs=0.5)
    assert set(Lengths(4).draw(np.random.default_rng(0), 9)) == {4}
