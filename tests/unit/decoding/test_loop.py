"""The decode loop on a decoder without a model: joining and leaving, ends, errors, fairness, closing."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.observer import LoopObserver
from blipstream.decoding.request import FinishReason, Prompt, SamplingParams
from blipstream.errors import (
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    RequestTimeoutError,
    ServerBusyError,
)
from tests.unit.decoding.fakes import (
    EOS,
    VOCAB_SIZE,
    Client,
    FakeDecoder,
    FakeEncoderDecoder,
    byte_tokenizer,
    make_prompt,
    run,
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Ledger(LoopObserver):
    """Keeps what the loop tells."""

    def __init__(self) -> None:
        self.steps, self.queue_times, self.first_tokens, self.outcomes = [], [], [], Counter()

    def on_step(self, report):
        self.steps.append(report)

    def on_start(self, queue_seconds):
        self.queue_times.append(queue_seconds)

    def on_first_token(self, seconds):
        self.first_tokens.append(seconds)

    def on_end(self, outcome):
        self.outcomes[outcome] += 1


def make_loop(decoder=None, **options):
    options = {"eos_token_ids": [EOS], **options}
    return DecodeLoop(decoder or FakeDecoder(), byte_tokenizer(), **options)


def submit(loop, seed=0, num_text=3, start_by=None, arrived_at=0.0, **params):
    params = SamplingParams(**{"max_tokens": 10, **params})
    client = Client(make_prompt(seed, num_text=num_text), params, f"request {seed}", start_by, arrived_at)
    loop.submit(client.request)
    return client


def greedy_alone(prompt: Prompt, max_tokens: int, eos_bias: float = 0.0) -> list[int]:
    """Greedy tokens of one sequence, computed without a loop."""
    decoder, tokens = FakeDecoder(eos_bias=eos_bias), []
    while len(tokens) < max_tokens and EOS not in tokens:
        tokens.append(int(decoder.logits([*decoder.history(prompt), *tokens]).argmax()))
    return tokens


# --- one sequence ----------------------------------------------------------------------------------------------------


def test_a_sequence_is_generated_to_its_length():
    loop = make_loop()
    client = submit(loop, max_tokens=7)
    run(loop)
    assert client.token_ids == greedy_alone(client.request.prompt, 7)
    assert client.finish_reason is FinishReason.LENGTH
    assert [chunk.num_output_tokens for chunk in client.chunks] == list(range(1, 8))


def test_a_sequence_ends_with_an_end_token():
    loop = make_loop(FakeDecoder(eos_bias=4.0))
    client = submit(loop, max_tokens=50)
    run(loop)
    assert client.finish_reason is FinishReason.EOS
    assert client.token_ids == greedy_alone(client.request.prompt, 50, eos_bias=4.0)
    assert client.token_ids[-1] == EOS
    assert client.text == byte_tokenizer().decode(client.token_ids)


def test_a_single_token_needs_no_decode_step():
    decoder = FakeDecoder()
    loop = make_loop(decoder)
    client = submit(loop, max_tokens=1)
    run(loop)
    assert (len(client.token_ids), client.finish_reason) == (1, FinishReason.LENGTH)
    assert decoder.steps == []


def test_a_stop_string_ends_the_sequence_and_is_not_part_of_the_text():
    loop = make_loop()
    whole = submit(loop, max_tokens=12)
    run(loop)
    word = byte_tokenizer().decode(whole.token_ids[5:7])
    before = whole.text.index(word)
    client = submit(loop, max_tokens=12, stop=(word,))
    run(loop)
    assert client.finish_reason is FinishReason.STOP
    assert client.text == whole.text[:before]
    assert client.token_ids == whole.token_ids[: len(client.token_ids)]


def test_minimum_tokens_put_off_the_end():
    loop = make_loop(FakeDecoder(eos_bias=1000.0))
    client = submit(loop, max_tokens=20, min_tokens=6)
    run(loop)
    assert client.token_ids[6:] == [EOS]
    assert EOS not in client.token_ids[:6]


def test_log_probabilities_come_with_their_tokens():
    loop = make_loop()
    client, other = submit(loop, log_probs=True), submit(loop)
    run(loop)
    assert [len(chunk.log_probs) for chunk in client.chunks] == [1] * 10
    assert all(value < 0 for value in client.log_probs)
    assert other.log_probs == []


def test_the_image_placeholder_counts_for_the_repetition_penalty():
    tokens = {}
    favourite = int(FakeDecoder().logits(FakeDecoder.history(make_prompt(0))).argmax())
    for image_token_id in (None, favourite):
        loop = make_loop(image_token_id=image_token_id)
        client = submit(loop, repetition_penalty=1e6, max_tokens=1)
        run(loop)
        tokens[image_token_id] = client.token_ids[0]
    assert tokens[None] == favourite
    assert tokens[favourite] != favourite


# --- rows and their limits -------------------------------------------------------------------------------------------


def test_more_tokens_than_the_row_holds_are_cut_to_what_fits():
    loop = make_loop(FakeDecoder(max_tokens=12))
    client = submit(loop, num_text=3, max_tokens=1000)  # 2 soft tokens + 3 of text leave 7
    run(loop)
    assert (len(client.token_ids), client.finish_reason) == (7, FinishReason.LENGTH)


def test_a_prompt_that_leaves_room_for_one_token_is_accepted():
    loop = make_loop(FakeDecoder(max_tokens=12))
    client = submit(loop, num_text=9)
    run(loop)
    assert (len(client.token_ids), client.finish_reason) == (1, FinishReason.LENGTH)


def test_a_prompt_that_leaves_no_room_is_refused():
    loop = make_loop(FakeDecoder(max_tokens=12))
    message = "the prompt has 12 tokens, 2 of them for the image, and at most 11 leave room for an answer"
    with pytest.raises(PromptTooLongError, match=message):
        submit(loop, num_text=10)
    assert not loop.step()


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ((), "the prompt must hold at least one token after the soft tokens, but it holds none"),
        ((1, -1), f"the prompt's token ids must be from 0 to {VOCAB_SIZE - 1}, but one of them is -1"),
        ((VOCAB_SIZE,), f"must be from 0 to {VOCAB_SIZE - 1}, but one of them is {VOCAB_SIZE}"),
    ],
)
def test_prompts_that_are_none_are_refused(token_ids, message):
    client = Client(Prompt(np.zeros((2, 4), np.float32), token_ids), SamplingParams(max_tokens=3))
    with pytest.raises(InvalidRequestError, match=message):
        make_loop().submit(client.request)


# --- joining and leaving ---------------------------------------------------------------------------------------------


def test_a_waiting_sequence_takes_the_place_of_one_that_ends_within_one_iteration():
    decoder = FakeDecoder(max_sequences=2)
    loop = make_loop(decoder)
    clients = [submit(loop, seed, max_tokens=length) for seed, length in enumerate((3, 9, 4))]
    loop.step()  # prefill of two, one step
    loop.step()  # the first ends
    assert clients[0].done
    assert not clients[2].chunks
    loop.step()
    assert clients[2].chunks
    run(loop)
    assert [client.token_ids for client in clients] == [
        greedy_alone(client.request.prompt, client.request.params.max_tokens) for client in clients
    ]


def test_prompts_that_wait_together_are_prefilled_together():
    decoder = FakeDecoder(max_sequences=8)
    loop = make_loop(decoder)
    for seed in range(5):
        submit(loop, seed, num_text=seed + 1)
    loop.step()
    assert decoder.prefills == [5]
    assert decoder.steps == [5]


request_plans = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "num_text": st.integers(1, 12),
        "max_tokens": st.integers(1, 30),
        "arrives": st.integers(0, 25),
        "cancels": st.one_of(st.none(), st.integers(0, 40)),
        "params": st.sampled_from(
            [
                {},
                {"temperature": 1.2, "seed": 5},
                {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 6},
                {"repetition_penalty": 1.4, "min_tokens": 1},
                {"bad_words": ("a", "b"), "frequency_penalty": 0.5},
                {"stop": ("a", "é", "xyz")},
            ]
        ),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    plans=st.lists(request_plans, min_size=1, max_size=12),
    max_sequences=st.integers(1, 5),
    budget=st.sampled_from([1, 20, 512]),
    make_decoder=st.sampled_from([FakeDecoder, FakeEncoderDecoder]),
)
def test_each_sequence_is_what_it_is_alone_whatever_comes_and_goes(plans, max_sequences, budget, make_decoder):
    decoder = make_decoder(max_sequences, max_tokens=32, eos_bias=3.0)
    loop = make_loop(decoder, config=LoopConfig(prefill_budget=budget))
    clients = [plan_client(plan) for plan in plans]
    for iteration in range(10_000):
        for plan, client in zip(plans, clients, strict=True):
            if plan["arrives"] == iteration:
                loop.submit(client.request)
            client.cancelled = plan["cancels"] is not None and plan["cancels"] <= iteration
        more = loop.step()
        loop.check_integrity()
        assert all(client.done for client in clients if client.cancelled and client.chunks)
        if not more and iteration > 25:
            break
    for plan, client in zip(plans, clients, strict=True):
        alone = plan_client(plan)
        quiet = make_loop(make_decoder(1, max_tokens=32, eos_bias=3.0))
        quiet.submit(alone.request)
        run(quiet)
        assert client.done
        if client.finish_reason is FinishReason.CANCELLED:
            assert plan["cancels"] is not None
            assert alone.token_ids[: len(client.token_ids)] == client.token_ids
            assert alone.text.startswith(client.text)
        else:
            assert (client.token_ids, client.text) == (alone.token_ids, alone.text)
            assert client.finish_reason is alone.finish_reason


def plan_client(plan):
    params = {"max_tokens": plan["max_tokens"], **plan["params"]}
    return Client(make_prompt(plan["seed"], num_text=plan["num_text"]), SamplingParams(**params))


# --- fairness --------------------------------------------------------------------------------------------------------


def test_a_burst_of_long_prompts_does_not_hold_up_running_sequences():
    ledger = Ledger()
    config = LoopConfig(prefill_budget=60, max_waiting=100)
    loop = make_loop(FakeDecoder(max_sequences=32, max_tokens=200), config=config, observer=ledger)
    runner = submit(loop, max_tokens=40)
    loop.step()
    burst = [submit(loop, seed, num_text=48, max_tokens=2) for seed in range(1, 31)]  # 50 tokens each
    for _ in range(30):
        before = len(runner.token_ids)
        loop.step()
        assert len(runner.token_ids) == before + 1
        assert ledger.steps[-1].prefill_tokens <= 60
    assert all(client.done for client in burst)


def test_a_stream_of_running_sequences_does_not_keep_out_a_prompt_when_a_slot_is_free():
    loop = make_loop(FakeDecoder(max_sequences=4, max_tokens=200), config=LoopConfig(prefill_budget=1))
    for seed in range(3):
        submit(loop, seed, max_tokens=150)
    for _ in range(3):
        loop.step()
    late = submit(loop, 9, num_text=100)
    loop.step()
    assert late.chunks


def test_waiting_requests_are_served_in_their_order():
    order = []
    loop = make_loop(FakeDecoder(max_sequences=2))
    clients = [submit(loop, seed, num_text=1 + seed % 5, max_tokens=1 + seed % 4) for seed in range(20)]
    while loop.step():
        order += [number for number, client in enumerate(clients) if client.chunks and number not in order]
    assert order[:18] == sorted(order)[:18]


# --- cancelling, waiting too long, a full queue ----------------------------------------------------------------------


def test_a_cancelled_sequence_frees_its_slot_before_the_next_step():
    decoder = FakeDecoder(max_sequences=2)
    loop = make_loop(decoder)
    first, second, waiting = (submit(loop, seed, max_tokens=20) for seed in range(3))
    loop.step()
    first.cancelled = True
    loop.step()
    assert first.finish_reason is FinishReason.CANCELLED
    assert len(first.token_ids) == 2  # nothing was generated for it any more
    assert len(waiting.token_ids) == 2
    assert len(second.token_ids) == 3


def test_a_request_cancelled_while_it_waits_is_never_prefilled():
    decoder = FakeDecoder(max_sequences=1)
    loop = make_loop(decoder, config=LoopConfig(waiting_poll_s=1e9))  # the look at admission is enough
    submit(loop, 0, max_tokens=3)
    waiting = submit(loop, 1)
    loop.step()
    waiting.cancelled = True
    run(loop)
    assert waiting.finish_reason is FinishReason.CANCELLED
    assert decoder.prefills == [1]


def test_waiting_requests_are_looked_at_in_intervals():
    clock = Clock()
    loop = make_loop(FakeDecoder(max_sequences=1), clock=clock, config=LoopConfig(waiting_poll_s=5.0))
    submit(loop, 0, max_tokens=30)
    loop.step()
    waiting = submit(loop, 1)
    waiting.cancelled = True
    loop.step()
    assert not waiting.done
    clock.now += 5.0
    loop.step()
    assert waiting.finish_reason is FinishReason.CANCELLED


def test_running_sequences_are_looked_at_in_intervals_when_asked():
    clock = Clock()
    loop = make_loop(clock=clock, config=LoopConfig(running_poll_s=5.0))
    client = submit(loop, 0, max_tokens=30)
    loop.step()
    client.cancelled = True
    loop.step()
    assert not client.done
    clock.now += 5.0
    loop.step()
    assert client.finish_reason is FinishReason.CANCELLED


def test_a_request_that_waits_too_long_is_told_so():
    clock = Clock()
    loop = make_loop(FakeDecoder(max_sequences=1), clock=clock)
    submit(loop, 0, max_tokens=30)
    late = submit(loop, 1, arrived_at=98.0, start_by=101.0)
    patient = submit(loop, 2, start_by=200.0, max_tokens=1)
    loop.step()
    clock.now = 101.5
    loop.step()
    assert isinstance(late.error, RequestTimeoutError)
    assert str(late.error) == "the request waited 3.500 s for a slot, and its timeout is 3.000 s"
    run(loop)
    assert patient.finish_reason is FinishReason.LENGTH


def test_a_running_sequence_does_not_expire():
    clock = Clock()
    loop = make_loop(clock=clock)
    client = submit(loop, start_by=101.0)
    loop.step()
    clock.now = 500.0
    run(loop)
    assert client.finish_reason is FinishReason.LENGTH


def test_a_full_queue_refuses_and_recovers():
    loop = make_loop(FakeDecoder(max_sequences=1), config=LoopConfig(max_waiting=1))
    clients = [submit(loop, 0)]
    with pytest.raises(ServerBusyError, match="the queue is full: 1 requests are waiting"):
        submit(loop, 1)
    loop.step()
    clients.append(submit(loop, 1))
    run(loop)
    assert all(client.done for client in clients)


# --- failures --------------------------------------------------------------------------------------------------------


class FaultyDecoder(FakeDecoder):
    """Fails on the calls it is told to fail on."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.failing_prompts: list[Prompt] = []
        self.fail_next_step: Exception | None = None
        self.poisoned_steps: set[int] = set()

    def prefill(self, first_row, prompts):
        if any(prompt is bad for prompt in prompts for bad in self.failing_prompts):
            self.rows[first_row : first_row + len(prompts)] = [None] * len(prompts)
            raise EngineError("decoder.onnx: the run failed: out of tune")
        return super().prefill(first_row, prompts)

    def decode(self, token_ids, lengths):
        logits = super().decode(token_ids, lengths)
        if self.fail_next_step is not None:
            error, self.fail_next_step = self.fail_next_step, None
            self.rows = [None] * self.max_sequences
            raise error
        if len(self.steps) in self.poisoned_steps:
            logits[0, 3] = np.nan
        return logits


def test_a_prompt_that_cannot_be_prefilled_fails_alone(caplog):
    decoder = FaultyDecoder()
    loop = make_loop(decoder)
    running = submit(loop, 0, max_tokens=6)
    loop.step()
    good, bad, fine = (submit(loop, seed, max_tokens=6) for seed in (1, 2, 3))
    decoder.failing_prompts = [bad.request.prompt]
    run(loop)
    assert str(bad.error) == "decoder.onnx: the run failed: out of tune"
    assert bad.token_ids == []
    for client in (running, good, fine):
        assert client.token_ids == greedy_alone(client.request.prompt, 6)
    assert "repeated one by one" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [(EngineError("decoder.onnx: the run failed"), "decoder.onnx: the run failed"), (OSError("gone"), "OSError")],
)
def test_a_failed_step_fails_the_running_sequences_and_the_loop_goes_on(error, message):
    decoder = FaultyDecoder(max_sequences=2)
    loop = make_loop(decoder)
    clients = [submit(loop, seed, max_tokens=6) for seed in range(3)]
    loop.step()
    decoder.fail_next_step = error
    run(loop)
    for client in clients[:2]:
        assert isinstance(client.error, EngineError)
        assert message in str(client.error)
        assert len(client.token_ids) == 2
    assert clients[2].token_ids == greedy_alone(clients[2].request.prompt, 6)


def test_logits_that_are_not_finite_fail_their_sequence_alone():
    decoder = FaultyDecoder()
    decoder.poisoned_steps = {2}
    loop = make_loop(decoder)
    clients = [submit(loop, seed, max_tokens=6) for seed in range(3)]
    run(loop)
    assert isinstance(clients[0].error, EngineError)
    assert len(clients[0].token_ids) == 2
    for client in clients[1:]:
        assert client.token_ids == greedy_alone(client.request.prompt, 6)


def test_a_request_that_bans_every_token_fails_alone():
    loop = make_loop(eos_token_ids=range(VOCAB_SIZE))
    impossible, other = submit(loop, 0, min_tokens=2), submit(loop, 1)
    run(loop)
    assert isinstance(impossible.error, InvalidRequestError)
    assert other.finish_reason is FinishReason.EOS


def test_a_client_that_cannot_take_a_chunk_is_dropped_alone(caplog):
    loop = make_loop()
    taken = []

    class Deaf(Client):
        def on_chunk(self, chunk):
            super().on_chunk(chunk)
            if len(self.token_ids) == 3:
                taken.append(chunk)
                raise ConnectionError("nobody is there")

    deaf = Deaf(make_prompt(0), SamplingParams(max_tokens=10), "the deaf one")
    loop.submit(deaf.request)
    other = submit(loop, 1, max_tokens=10)
    run(loop)
    assert [chunk.finish_reason for chunk in taken] == [None, FinishReason.CANCELLED]
    assert deaf.done
    assert other.token_ids == greedy_alone(other.request.prompt, 10)
    assert "request the deaf one is dropped: on_chunk failed" in caplog.text


def test_a_client_whose_cancellation_cannot_be_asked_for_is_dropped_alone(caplog):
    loop = make_loop()
    client = Client(make_prompt(0), SamplingParams(max_tokens=10))

    def ask():
        if client.chunks:
            raise ConnectionError("nobody is there")
        return False

    loop.submit(dataclasses.replace(client.request, is_cancelled=ask))
    other = submit(loop, 1)
    run(loop)
    assert client.finish_reason is FinishReason.CANCELLED
    assert other.finish_reason is FinishReason.LENGTH
    assert "is_cancelled failed" in caplog.text


def test_an_observer_at_fault_does_not_stop_the_loop(caplog):
    class Faulty(LoopObserver):
        def on_step(self, report):
            raise RuntimeError("no such metric")

        on_start = on_first_token = on_end = on_step

    loop = make_loop(observer=Faulty())
    client = submit(loop)
    run(loop)
    assert client.finish_reason is FinishReason.LENGTH
    assert "the observer of the decode loop failed" in caplog.text


# --- what the observer is told ---------------------------------------------------------------------------------------


def test_the_numbers_that_the_observer_gets_add_up():
    clock, ledger = Clock(), Ledger()
    loop = make_loop(FakeDecoder(max_sequences=2, eos_bias=2.0), clock=clock, observer=ledger)
    clients = [submit(loop, seed, num_text=seed + 1, max_tokens=9) for seed in range(4)]
    cancelled = submit(loop, 9, arrived_at=99.0)
    cancelled.cancelled = True
    while loop.step():
        clock.now += 1.0
    assert sum(report.prefill_tokens for report in ledger.steps) == sum(2 + seed + 1 for seed in range(4))
    assert sum(report.generated_tokens for report in ledger.steps) == sum(len(client.token_ids) for client in clients)
    assert max(report.running for report in ledger.steps) == 2
    assert (ledger.steps[0].waiting, ledger.steps[-1].waiting, ledger.steps[-1].running) == (2, 0, 0)
    assert len(ledger.queue_times) == len(ledger.first_tokens) == 4
    assert ledger.queue_times[:2] == [0.0, 0.0]
    assert ledger.queue_times[2] >= 1.0
    assert ledger.outcomes == Counter(client.finish_reason.value for client in (*clients, cancelled))
    assert ledger.outcomes["cancelled"] == 1


# --- the thread ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threaded():
    """Starts loops and closes them after the test."""
    loops = []

    def start(*args, **options):
        loop = make_loop(*args, **options)
        loop.start()
        loops.append(loop)
        return loop

    yield start
    for loop in loops:
        loop.close(drain=False)


class Waiter(Client):
    """A client that can be waited for."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.last = threading.Event()
        self.first = threading.Event()

    def on_chunk(self, chunk) -> None:
        super().on_chunk(chunk)
        self.first.set()
        if chunk.is_last:
            self.last.set()


def test_closing_generates_what_was_accepted_to_its_end(threaded):
    loop = threaded()
    clients = [submit(loop, seed, max_tokens=20) for seed in range(10)]
    loop.close()
    for client in clients:
        assert client.token_ids == greedy_alone(client.request.prompt, 20)
    with pytest.raises(ServerBusyError, match="the server is shutting down and takes no more requests"):
        submit(loop)
    loop.close()


def test_closing_without_draining_cancels_everything(threaded):
    loop = threaded(FakeDecoder(max_sequences=2, max_tokens=100_000))
    endless = SamplingParams(max_tokens=90_000, min_tokens=90_000)
    clients = [Waiter(make_prompt(seed), endless) for seed in range(5)]
    for client in clients:
        loop.submit(client.request)
    assert clients[0].first.wait(60)
    loop.close(drain=False)
    assert [client.finish_reason for client in clients] == [FinishReason.CANCELLED] * 5


def test_closing_a_loop_that_was_never_started():
    loop = make_loop()
    clients = [submit(loop, seed, max_tokens=5) for seed in range(6)]
    loop.close()
    assert [client.finish_reason for client in clients] == [FinishReason.LENGTH] * 6
    cancelled = make_loop()
    client = submit(cancelled)
    cancelled.close(drain=False)
    assert client.finish_reason is FinishReason.CANCELLED


def test_a_loop_starts_once(threaded):
    with pytest.raises(RuntimeError, match="the decode loop has been started already"):
        threaded().start()


def test_an_idle_loop_does_nothing_until_a_request_comes(threaded):
    ledger = Ledger()
    loop = threaded(observer=ledger)
    for seed in range(3):
        client = Waiter(make_prompt(seed), SamplingParams(max_tokens=4))
        loop.submit(client.request)
        assert client.last.wait(60)
    loop.close()
    assert len(ledger.steps) == 3 * 3  # the first iteration of each request yields two tokens, and none is run idly


def test_a_fault_of_the_loop_fails_everybody_and_the_loop_goes_on(threaded, caplog):
    caplog.set_level(logging.CRITICAL)  # the traceback is expected

    class WrongShape(FakeDecoder):
        wrong = True

        def decode(self, token_ids, lengths):
            logits = super().decode(token_ids, lengths)
            return logits[:0] if self.wrong else logits

    decoder = WrongShape(max_sequences=1)
    loop = threaded(decoder)
    clients = [Waiter(make_prompt(seed), SamplingParams(max_tokens=4)) for seed in range(2)]
    for client in clients:
        loop.submit(client.request)
    assert clients[0].last.wait(60)
    assert isinstance(clients[0].error, EngineError)
    assert str(clients[0].error).startswith("the decode loop failed: ValueError(")
    assert clients[1].last.wait(60)
    decoder.wrong = False
    good = Waiter(make_prompt(5), SamplingParams(max_tokens=4))
    loop.submit(good.request)
    assert good.last.wait(60)
    assert good.finish_reason is FinishReason.LENGTH


def test_many_threads_submit_and_cancel(threaded):
    """Nothing is lost, nothing is mixed up, and every request has exactly one last chunk."""
    loop = threaded(FakeDecoder(max_sequences=5, eos_bias=2.0), config=LoopConfig(max_waiting=20, prefill_budget=16))
    results = []

    def use(worker: int) -> None:
        rng = np.random.default_rng(worker)
        for number in range(12):
            params = SamplingParams(max_tokens=int(rng.integers(1, 40)))
            client = Waiter(make_prompt(1000 * worker + number, num_text=int(rng.integers(1, 9))), params)
            try:
                loop.submit(client.request)
            except ServerBusyError:
                continue
            if number % 4 == 3:
                client.first.wait(60)
                client.cancelled = True
            results.append(client)
            if number % 3 == 0:
                client.last.wait(60)

    threads = [threading.Thread(target=use, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.close()
    loop.check_integrity()
    assert len(results) >= 8 * 4
    reasons = Counter(client.finish_reason for client in results)
    assert reasons[FinishReason.EOS]
    for client in results:
        expected = greedy_alone(client.request.prompt, client.request.params.max_tokens, eos_bias=2.0)
        assert client.done
        if client.finish_reason is FinishReason.CANCELLED:
            assert expected[: len(client.token_ids)] == client.token_ids
        else:
            assert client.token_ids == expected
