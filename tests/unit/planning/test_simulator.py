"""The simulated server, where arithmetic says what must come out; and the plans made of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blipstream.bench.workload import Lengths
from blipstream.cli import app
from blipstream.errors import InvalidRequestError
from blipstream.planning.capacity import capacity, plan, throughput
from blipstream.planning.capacity import draw_questions as draw_with
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
    max_prompt_tokens=255,
    max_tokens=256,
    answer_apart=False,
    fastest=0.9,
    slowest=1.25,
    others=0.5,
)
ASKED = [Question(text_tokens=8, output_tokens=3)] * 12


def draw_questions(text_tokens: Lengths, output_tokens: Lengths, count: int) -> list[Question]:
    questions, cut = draw_with(text_tokens, output_tokens, count, STAGES)
    assert cut == 0
    return questions


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
    file = tmp_path / "stages.json"
    STAGES.save(file)
    assert StageTimes.load(file) == STAGES
    kept = json.loads(file.read_text())
    faults = (
        {"images": []},
        {"step": [[1, 0.1], [1, 0.2]]},
        {"overlap": 0},
        {"others": "x"},
        {"slowest": math.inf},
    )
    for text in ("", "{}", "[]", *(json.dumps({**kept, **fault}) for fault in faults)):
        file.write_text(text)
        with pytest.raises(InvalidRequestError, match="does not hold the times"):
            StageTimes.load(file)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ((), 0, "repeated measurements were 10% shorter to 25% longer than these medians"),
        ((), 0, "other programs kept 0.5 cores busy meanwhile: measure again"),
        (("--request-rate", "1e6"), 0, r"1000000 requests a second need \d+ such machines \(\d+ to \d+\)"),
        (
            ("--output-tokens", "200:50", "--limit", "e2el:1e5"),
            0,
            r"\d+ of 40 requests were cut to what the bundle has room for",
        ),
        (("--output-tokens", "1000"), 1, "room for 214 tokens after an image and 10 of text, but answers .* have 1000"),
        (("--text-tokens", "300"), 1, "room for 0 tokens after an image and 300 of text"),
        (("--limit", "e2el:1"), 1, "no number of such machines gives 90 % of requests e2el of at most 1 ms"),
        (("--limit", "tpot:3"), 1, "a limit must be NAME:MILLISECONDS of ttft, e2el"),
        (("--limit", "e2el:3", "--limit", "e2el:4"), 1, "there may be one limit of e2el"),
        (("--request-rate", "0"), 1, r"must be 0\.001 to 1000000 a second"),
        (("--output-tokens", "x"), 1, "output tokens must be"),
        (("--stages", "/nowhere.json"), 1, "/nowhere.json cannot be read: No such file"),
        (("/nowhere",), 1, "/nowhere"),
        (("/nowhere", "--stages", "/nowhere/x.json"), 1, "/nowhere/x.json cannot be written"),
    ],
)
def test_the_command(options: tuple[str, ...], status: int, said: str, tmp_path: Path) -> None:
    STAGES.save(tmp_path / "stages.json")
    arguments = ["plan", "--stages", str(tmp_path / "stages.json"), "--requests", "40", *options]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert done.exit_code == status, done.output
    assert re.search(said, " ".join(done.output.split()))
    assert "e+" not in done.output


@pytest.mark.parametrize(("apart", "room"), [(False, 214), (True, 255)])
def test_answers_are_cut_to_the_room_behind_their_prompts(apart: bool, room: int) -> None:
    stages = dataclasses.replace(STAGES, answer_apart=apart)
    questions, cut = draw_with(Lengths(10), Lengths(200, 50), 400, stages)
    assert max(question.output_tokens for question in questions) == room
    assert 0 < cut <= sum(question.output_tokens == room for question in questions)
    questions, _ = draw_with(Lengths(200, 50), Lengths(5), 400, stages)
    assert max(question.text_tokens for question in questions) == 255 - 32
    assert min(question.output_tokens for question in questions) == (5 if apart else 1)
    with pytest.raises(InvalidRequestError, match=f"room for {room} tokens"):
        draw_with(Lengths(10), Lengths(room + 1), 20, stages)


def test_a_capacity_scales_with_the_times() -> None:
    asked = draw_questions(Lengths(10), Lengths(5), 200)
    one, half = (plan(STAGES.scaled(factor), asked, 10.0, {"e2el": 1e6}, 90.0) for factor in (1.0, 2.0))
    assert one.saturated == pytest.approx(2 * half.saturated)
    assert half.alone == pytest.approx(2 * one.alone)
