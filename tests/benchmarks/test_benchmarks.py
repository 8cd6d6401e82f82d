"""The benchmarks: the closed loop and the queue with systems made for it, rows and plots."""

from __future__ import annotations

import dataclasses
import math
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import workload
from benchmarks.harness import Answer, Figures, Record, Request, figures_of, run_closed_loop, share_equal
from benchmarks.measure import Plan, measure
from benchmarks.peers import Batching
from benchmarks.plot import draw
from benchmarks.rows import Load, Round, Row, Setting, append_rows, make_rows, read_rows
from benchmarks.setting import cpu_model

SETTING = Setting("2026-01-02T03:04:05+00:00", "cpu, model", 2, 2, 0.5, "1", "2", "3", "4", "5", "demo", "python -m x")


def requests(count: int) -> list[Request]:
    return [Request(b"", str(number)) for number in range(count)]


def answer_to(request: Request) -> Answer:
    return Answer((int(request.prompt), 2), time.perf_counter())


class Echo:
    """Answers with the number in the prompt."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name

    def answer(self, request: Request) -> Answer:
        return answer_to(request)


class Meeting:
    """Answers ``size`` requests at a time, and only when so many are under way; notes the most that ever were."""

    name = "meeting"

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._lock = threading.Lock()
        self._running = 0
        self.most = 0

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        self._barrier.wait(timeout=30)
        with self._lock:
            self._running -= 1
        return answer_to(request)


def test_closed_loop_keeps_as_many_requests_under_way_as_there_are_clients() -> None:
    system = Meeting(4)
    records = run_closed_loop(system, requests(12), concurrency=4)
    assert system.most == 4
    assert [record.token_ids[0] for record in records] == list(range(12))
    assert all(record.sent_at <= record.first_token_at <= record.done_at for record in records)


def test_closed_loop_fails_with_the_system() -> None:
    class Broken(Echo):
        def answer(self, request: Request) -> Answer:
            if request.prompt == "3":
                raise RuntimeError("out of order")
            return answer_to(request)

    with pytest.raises(RuntimeError, match="out of order"):
        run_closed_loop(Broken(), requests(6), concurrency=2)


class Gate:
    """A ``generate`` that begins to answer when it is told to, and notes its batches."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.batches: list[int] = []

    def __call__(self, batch: Sequence[Request]) -> list[Answer]:
        self.batches.append(len(batch))
        self.entered.set()
        assert self.open.wait(30)
        return [answer_to(request) for request in batch]


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 6), (4, [1, 4, 1]), (16, [1, 5])])
def test_worker_batches_what_waits(batch_size: int, batches: list[int]) -> None:
    generate = Gate()
    found: dict[int, Answer] = {}

    with Batching("peer", generate, batch_size) as system:

        def send(request: Request) -> None:
            found[int(request.prompt)] = system.answer(request)

        clients = [threading.Thread(target=send, args=(request,)) for request in requests(6)]
        clients[0].start()
        assert generate.entered.wait(30)
        for client in clients[1:]:
            client.start()
        deadline = time.monotonic() + 30
        while system.waiting < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        generate.open.set()
        for client in clients:
            client.join(30)
    assert generate.batches == batches
    assert {number: answer.token_ids for number, answer in found.items()} == {n: (n, 2) for n in range(6)}


def test_worker_hands_on_a_failure_and_goes_on() -> None:
    def generate(batch: Sequence[Request]) -> list[Answer]:
        if batch[0].prompt == "0":
            raise ValueError("no such image")
        return [answer_to(request) for request in batch]

    with Batching("peer", generate, 1) as system:
        with pytest.raises(ValueError, match="no such image"):
            system.answer(requests(1)[0])
        assert system.answer(requests(2)[1]).token_ids == (1, 2)


def test_figures() -> None:
    records = [
        Record(sent_at=10.0, first_token_at=10.1, done_at=10.5, token_ids=(5, 6, 7, 8, 2)),
        Record(sent_at=10.5, first_token_at=10.8, done_at=12.0, token_ids=(2,)),
    ]
    figures = figures_of(records)
    assert figures.request_throughput == pytest.approx(1.0)
    assert figures.output_token_throughput == pytest.approx(3.0)
    assert figures.time_to_first_token_p50 == pytest.approx(200)
    assert figures.time_to_first_token_p95 == pytest.approx(290)
    assert figures.inter_token_latency_p50 == pytest.approx(100)  # an answer of one token has none
    assert figures.request_latency_p50 == pytest.approx(1000)
    assert math.isnan(figures_of(records[1:]).inter_token_latency_p95)


def test_share_equal_counts_requests_whose_every_token_is_equal() -> None:
    reference = run_closed_loop(Echo(), requests(4), 1)
    shortened = dataclasses.replace(reference[2], token_ids=reference[2].token_ids[:1])
    assert share_equal([*reference[:2], shortened, reference[3]], reference) == 0.75


def rows_of(throughputs: dict[str, list[float]], concurrency: int = 4) -> list[Row]:
    rounds = {
        system: [Round(Figures(value, *[10 / value] * 7), 1.0) for value in values]
        for system, values in throughputs.items()
    }
    return make_rows(SETTING, Load("distinct", concurrency, 8), rounds, ["slow", "fast"])


def test_rows_are_medians_and_ratios_to_the_best_peer_of_the_same_round() -> None:
    ours, slow, fast = rows_of({"ours": [30.0, 20.0, 60.0], "slow": [5.0, 5.0, 5.0], "fast": [10.0, 10.0, 10.0]})
    assert (ours.request_throughput, ours.request_throughput_min, ours.request_throughput_max) == (30, 20, 60)
    assert (ours.request_throughput_ratio, slow.request_throughput_ratio, fast.request_throughput_ratio) == (3, 0.5, 1)
    assert ours.request_latency_p50_ratio == pytest.approx(1 / 3, abs=1e-3)
    assert slow.time_to_first_token_p50_ratio == 2


def test_rows_are_appended_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.csv"
    rows = rows_of({"ours": [3.0], "slow": [1.0], "fast": [2.0]})
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path, Row) == rows


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("date,speed\n2026,1\n")
    with pytest.raises(ValueError, match=r"rows\.csv has other columns .*speed"):
        append_rows(path, rows_of({"ours": [3.0], "slow": [1.0], "fast": [2.0]}))
    assert path.read_text() == "date,speed\n2026,1\n"


def test_plot_is_drawn_from_the_rows_of_one_run(tmp_path: Path) -> None:
    rows = [row for c in (1, 16) for row in rows_of({"ours": [3.0, 4.0], "slow": [1.0, 1.0], "fast": [2.0, 2.0]}, c)]
    draw(rows, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert len(image.getcolors(maxcolors=1 << 24)) > 10
    with pytest.raises(ValueError, match="exactly one run"):
        draw([*rows, dataclasses.replace(rows[0], date="2027")], tmp_path / "other.png")


def test_distinct_load_has_no_image_twice_and_the_repeated_one_has_few() -> None:
    distinct, repeated = workload.distinct("test", 0, 12), workload.repeated("test", 0, 12)
    assert len({request.image for request in distinct}) == 12
    assert len({request.image for request in repeated}) == workload.REPEATED_IMAGES
    for load in (distinct, repeated):
        assert [request.prompt == "" for request in load] == [True, False] * 6
    assert len({request.prompt for request in distinct}) > 4


def test_plan_measures_each_system_in_each_round_on_the_same_requests() -> None:
    class Noting(Echo):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.images: list[bytes] = []

        def answer(self, request: Request) -> Answer:
            self.images.append(request.image)
            return Answer((len(request.prompt), 2), time.perf_counter())

    one, other = Noting("one"), Noting("other")
    done: list[int] = []
    rounds = measure([one, other], "one", Plan(requests=3, rounds=2), lambda _, count: done.append(count))
    assert sum(done) == 2 * 4 * 2
    for load in Plan(3, 2).loads:
        assert [len(rounds[load][name]) for name in ("one", "other")] == [2, 2]
        assert all(entry.outputs_equal == 1 for entry in rounds[load]["other"])
    assert sorted(one.images) == sorted(other.images)


UNNAMED = platform.processor() or platform.machine()
LISTINGS = {
    "avx2": ("model name\t: AMD EPYC\nflags\t\t: fpu avx avx2 vaes\n", "AMD EPYC (AVX2)"),
    "vnni": (
        "model name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx_vnni avx512_vnni avx512_bf16\n",
        "AMD EPYC (AVX2, AVX-512, VNNI, bf16)",
    ),
    "arm": (
        "processor\t: 0\nFeatures\t: fp asimddp i8mm bf16\n",
        f"{UNNAMED} (dot product, i8mm, bf16)",
    ),
    "old": ("model name\t: Old: one\nflags\t\t: fpu sse2\n", "Old: one"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_processor_is_named_with_what_it_multiplies_by(name: str, tmp_path: Path) -> None:
    listing, expected = LISTINGS[name]
    file = tmp_path / "cpuinfo"
    file.write_text(f"{listing}\n{listing.replace('avx2', '').replace('i8mm', '')}")  # the first one counts
    assert cpu_model(file) == expected


def test_a_machine_without_such_a_listing_has_a_name_too(tmp_path: Path) -> None:
    assert cpu_model(tmp_path / "none") == UNNAMED
