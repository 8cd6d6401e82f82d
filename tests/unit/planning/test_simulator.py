"""The simulated server, where arithmetic says what must come out; and the plans made of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from blipstream.bench.workload import Lengths
from blipstream.errors import InvalidRequestError
from blipstream.planning.capacity import capacity, draw_questions, plan, throughput
from blipstream.planning.simulator import Question, simulate_closed, simulate_open
from blipstream.planning.stages import StageTimes, interpolate

STAGES = StageTimes(
    images=[(1, 0.5), (2, 1.0)],
    prefill=[(40, 0.2), (80, 0.4)],
    step=[(1, 0.1), (4, 0.1)],
    overlap=1.0,
    max_images=8,
    max_sequences=4,
    prefill_budget=512,
    image_tokens=32,
)
ASKED = [Question(text_tokens=8, output_tokens=3)] * 12


def test_alone_a_request_takes_the_sum_of_its_stages() -> None:
    for outcome in simulate_closed(STAGES, ASKED, 1):
        assert outcome.ttft == pytest.approx(0.5 + 0.2)
        assert outcome.e2el == pytest.approx(0.5 + 0.2 + 2 * 0.1)
    (one,) = simulate_open(STAGES, ASKED[:1], rate=5.0)
    assert one.e2el == pytest.approx(0.9)


def test_requests_that_come_together_share_batches() -> None:
    """Four at once: one batch of images, one prefill, and two steps for all."""
    outcomes = simulate_closed(STAGES, ASKED[:4], 4)
    assert [own.sent_at for own in outcomes] == [0.0] * 4
    assert [own.done_at for own in outcomes] == [pytest.approx(4 * 0.5 + 4 * 0.2 + 2 * 0.1)] * 4


def test_what_overlaps_loses_as_much_as_was_measured() -> None:
    slow, asked = dataclasses.replace(STAGES, overlap=0.5), draw_questions(Lengths(10, 3), Lengths(8, 4), 60)
    assert throughput(simulate_closed(slow, asked, 4)) < 0.95 * throughput(simulate_closed(STAGES, asked, 4))
    assert throughput(simulate_closed(slow, ASKED, 1)) == pytest.approx(throughput(simulate_closed(STAGES, ASKED, 1)))


def test_rows_and_the_budget_of_a_prefill_are_kept() -> None:
    few = dataclasses.replace(STAGES, max_sequences=1)
    long = [Question(8, 50)] * 3
    first, second, third = sorted(own.first_token_at for own in simulate_closed(few, long, 3))
    assert second - first > 49 * 0.1, "the row was not free"
    assert third - second > 49 * 0.1
    narrow = dataclasses.replace(STAGES, prefill_budget=40, images=[(1, 0.0), (8, 0.0)])
    tokens = sorted(own.first_token_at for own in simulate_closed(narrow, ASKED[:3], 3))
    assert tokens[1] >= tokens[0] + 0.2, "two prompts were read in one iteration"


def test_more_clients_wait_longer_and_get_more_out_of_the_machine() -> None:
    asked = draw_questions(Lengths(10, 3), Lengths(8, 4), 200)
    runs = [simulate_closed(STAGES, asked, clients) for clients in (1, 4, 16)]
    assert [len(own) for own in runs] == [200] * 3
    rates = [throughput(own) for own in runs]
    waits = [sum(own.e2el for own in outcomes) for outcomes in runs]
    assert rates == sorted(rates)
    assert waits == sorted(waits)


def test_a_plan() -> None:
    asked = draw_questions(Lengths(10), Lengths(5), 200)
    loose, tight = (plan(STAGES, asked, 10.0, {"e2el": limit}, 90.0) for limit in (20_000.0, 3_000.0))
    assert loose.alone == tight.alone == pytest.approx(0.5 + 0.21 + 0.4)
    assert tight.capacity < loose.capacity <= loose.saturated
    assert tight.machines is not None
    assert loose.machines is not None
    assert tight.machines > loose.machines >= 10.0 / loose.saturated
    assert plan(STAGES, asked, 10.0, {"ttft": 600.0}, 90.0).machines is None, "alone, it takes 710 ms"


def test_within_the_capacity_the_limit_is_kept_and_beyond_it_is_not() -> None:
    asked = draw_questions(Lengths(10), Lengths(5), 300)
    found = capacity(STAGES, asked, {"e2el": 4000.0}, 90.0, saturated=2.0)
    for rate, kept in ((0.98 * found, True), (1.05 * found, False)):
        late = sum(own.e2el > 4.0 for own in simulate_open(STAGES, asked, rate))
        assert (late <= 0.1 * len(asked)) == kept


@pytest.mark.parametrize(
    ("amount", "expected"), [(0.5, 1.0), (1, 1.0), (1.5, 1.5), (2, 2.0), (3, 4.0), (4, 6.0), (6, 10.0)]
)
def test_curves(amount: float, expected: float) -> None:
    assert interpolate([(1, 1.0), (2, 2.0), (4, 6.0)], amount) == expected
    assert interpolate([(1, 7.0)], amount) == 7.0


def test_times_are_kept_in_a_file(tmp_path: Path) -> None:
    STAGES.save(tmp_path / "stages.json")
    assert StageTimes.load(tmp_path / "stages.json") == STAGES
    for text in ("", "{}", "[]", '{"images": 3}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InvalidRequestError, match="does not hold the times"):
            StageTimes.load(tmp_path / "other.json")
    with pytest.raises(InvalidRequestError, match="does not hold the times"):
        StageTimes.load(tmp_path / "missing.json")
