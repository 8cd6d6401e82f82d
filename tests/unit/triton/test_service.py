"""The service around the decode loop, with calls and a decoder of its own in place of Triton and a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from blipstream.config import ServerConfig
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.text import Tokenizer
from blipstream.errors import EngineError, InvalidRequestError, PromptTooLongError, RequestTimeoutError, ServerBusyError
from blipstream.features import Features, ImageFeatures
from blipstream.instructions import InstructionEncoder
from blipstream.triton.inputs import ImageSource, RequestParser
from blipstream.triton.service import GenerationService
from tests.unit.decoding.fakes import EOS, FakeDecoder, byte_tokenizer
from tests.unit.triton.fakes import FakeCall, make_manifest

NO_EOS = -1e9


class SlowDecoder(FakeDecoder):
    """While it is not ``going``, each decode step waits for ``one_step``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.going = threading.Event()
        self.going.set()
        self.one_step = threading.Semaphore(0)

    def decode(self, token_ids: Any, lengths: Any) -> Any:
        while not (self.going.wait(0.001) or self.one_step.acquire(blocking=False)):
            pass
        return super().decode(token_ids, lengths)


class Images:
    """Computes the features of an image: one soft token for each of its first two bytes.

    An instruction adds its sum to the soft tokens.
    """

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        """Images that the ViT has read."""
        self.rereads: list[tuple[int, ...]] = []
        """Instructions for which the Q-Former alone has run."""
        self.going = threading.Event()
        self.going.set()
        self.error: Exception | None = None

    def features(self, image: ImageSource, instruction: Sequence[int]) -> ImageFeatures:
        image_embeds = self.soft_tokens(image)
        return ImageFeatures(image_embeds + sum(instruction), image_embeds)

    def soft_tokens_of(self, image_embeds: Features, instruction: Sequence[int]) -> Features:
        self.rereads.append(tuple(instruction))
        return image_embeds + np.float32(sum(instruction))

    def soft_tokens(self, image: ImageSource) -> Features:
        assert image.file is not None
        self.calls.append(image.file)
        self.going.wait(60)
        if self.error is not None:
            raise self.error
        return np.array([[image.file[i]] * 4 for i in (0, 1)], np.float32)


class Bench:
    """A running service with its decoder and image models."""

    def __init__(
        self,
        *,
        max_sequences: int = 2,
        max_tokens: int = 64,
        instructed: bool = False,
        num_frames: int = 1,
        **config: Any,
    ) -> None:
        self.decoder = SlowDecoder(max_sequences=max_sequences, max_tokens=max_tokens, eos_bias=NO_EOS)
        self.images = Images()
        settings = ServerConfig(**{"request_timeout": 0.0, **config})
        manifest = make_manifest(
            max_sequences=max_sequences, max_tokens=max_tokens, instructed=instructed, num_frames=num_frames
        )
        section = manifest.qformer.instruction
        encoder = None if section is None else InstructionEncoder(byte_tokenizer(), section)
        self.service = GenerationService(
            RequestParser(manifest, settings, encoder),
            byte_tokenizer(),
            (EOS,),
            self.images,
            lambda metrics: DecodeLoop(
                self.decoder,
                byte_tokenizer(),
                eos_token_ids=[EOS],
                config=LoopConfig(waiting_poll_s=0.0),
                observer=metrics,
            ),
            settings,
            max_sequences,
        )
        self.service.start()

    def ask(self, image: bytes | list[bytes] = b"\x00image", **inputs: Any) -> FakeCall:
        call = FakeCall(image=image, **inputs)
        self.service.accept(call)
        return call

    def fill(self) -> list[FakeCall]:
        """Occupy every slot with sequences that stand still until ``decoder.going`` is set."""
        self.decoder.going.clear()
        calls = []
        for count in range(1, self.decoder.max_sequences + 1):
            calls.append(self.ask(stream=True, max_tokens=50))
            self.step_until(lambda count=count: sum(self.decoder.prefills) >= count)
        return calls

    def step_until(self, condition: Any) -> None:
        """Let the loop go on step by step: between two, it looks at its queue and at who has cancelled."""
        while not condition():
            self.decoder.one_step.release()
            time.sleep(0.01)

    def outcomes(self) -> dict[str, int]:
        return dict(self.service.metrics.take()[2])


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.decoder.going.set()
    bench.images.going.set()
    bench.service.close()


def test_streamed_and_whole_text_are_the_same(bench: Bench) -> None:
    whole = bench.ask(text_input=b"why?", max_tokens=12).wait()
    streamed = bench.ask(text_input=b"why?", max_tokens=12, stream=True).wait()
    assert len(whole.answers) == 1
    assert whole.finish_reason == "length"
    assert whole.answers[0].num_output_tokens == 12
    assert whole.answers[0].num_input_tokens == 2 + 4
    assert streamed.text == whole.text
    assert streamed.token_ids == whole.token_ids
    assert len(whole.token_ids) == 12
    assert [answer.finish_reason for answer in streamed.answers[:-1]] == [""] * (len(streamed.answers) - 1)


def test_an_empty_text_begins_with_the_begin_token(bench: Bench) -> None:
    assert bench.ask(max_tokens=5).wait().answers[0].num_input_tokens == 2 + 1
    assert bench.ask(max_tokens=5, text_input=b"").wait().token_ids == bench.ask(max_tokens=5).wait().token_ids


def test_log_probs_come_when_asked_for(bench: Bench) -> None:
    answer = bench.ask(max_tokens=5, return_log_probs=True).wait().answers[0]
    assert answer.log_probs is not None
    assert len(answer.log_probs) == 5
    assert answer.cum_log_prob == pytest.approx(sum(answer.log_probs))
    tensors = answer.tensors()
    assert tensors["output_log_probs"].shape == (1, 1, 5)
    assert tensors["cum_log_probs"].shape == (1, 1)
    assert "cum_log_probs" not in bench.ask(max_tokens=5).wait().answers[0].tensors()


def test_an_image_is_computed_once(bench: Bench) -> None:
    for _ in range(3):
        bench.ask(image=b"\x01one", max_tokens=2).wait()
    bench.ask(image=b"\x02two", max_tokens=2).wait()
    assert bench.images.calls == [b"\x01one", b"\x02two"]
    gauges = bench.service.gauges()
    assert (gauges["feature_cache_hits_total"], gauges["feature_cache_misses_total"]) == (2, 2)
    assert gauges["feature_cache_bytes"] == 2 * 32


@pytest.fixture
def instructed_bench() -> Iterator[Bench]:
    bench = Bench(instructed=True)
    yield bench
    bench.images.going.set()
    bench.service.close()


def test_another_instruction_about_an_image_runs_the_qformer_alone(instructed_bench: Bench) -> None:
    bench = instructed_bench
    answers = [bench.ask(text_input=text, max_tokens=4).wait().token_ids for text in (b"a", b"bc", b"a", b"")]
    assert answers[0] == answers[2]
    assert len(set(answers)) == 3
    assert bench.images.calls == [b"\x00image"]
    assert bench.images.rereads == [(98, 99), ()]
    gauges = bench.service.gauges()
    assert (gauges["feature_cache_hits_total"], gauges["feature_cache_misses_total"]) == (1, 3)
    assert gauges["feature_cache_embeds_hits_total"] == 2
    assert gauges["feature_cache_bytes"] == 4 * 32


def test_concurrent_instructions_about_one_image_share_the_vit(instructed_bench: Bench) -> None:
    bench = instructed_bench
    bench.images.going.clear()
    calls = [bench.ask(text_input=b"%d" % (i % 4), max_tokens=3) for i in range(12)]
    wait_until(lambda: bench.service.gauges()["feature_cache_embeds_hits_total"] == 3)
    bench.images.going.set()
    answers = [call.wait().token_ids for call in calls]
    assert all(answers[i] == answers[i % 4] for i in range(12))
    assert bench.images.calls == [b"\x00image"]
    assert len(set(bench.images.rereads)) == len(bench.images.rereads) == 3


def test_an_instruction_that_the_qformer_cannot_hold_is_refused_before_anything_runs(instructed_bench: Bench) -> None:
    error = instructed_bench.ask(text_input=b"a" * 10).wait().error
    assert isinstance(error, PromptTooLongError)
    assert str(error) == "the prompt has 10 tokens for the Q-Former, which reads an instruction of at most 9"
    assert not instructed_bench.images.calls
    wait_until(lambda: instructed_bench.outcomes() == {"invalid": 1})


def test_frames_are_kept_one_by_one_and_joined_in_their_order() -> None:
    """Each frame has two soft tokens; the decoder sees those of all, and their order changes the text."""
    bench = Bench(instructed=True, num_frames=3)
    frames = [b"\x01\x02", b"\x03\x04", b"\x05\x06"]
    first = bench.ask(image=frames, text_input=b"a", max_tokens=6).wait()
    assert first.answers[0].num_input_tokens == 3 * 2 + 1
    assert sorted(bench.images.calls) == frames
    backwards = bench.ask(image=frames[::-1], text_input=b"a", max_tokens=6).wait()
    assert backwards.token_ids != first.token_ids
    assert (len(bench.images.calls), bench.images.rereads) == (3, [])
    still = bench.ask(image=[frames[0]] * 3, text_input=b"b", max_tokens=6).wait()
    assert still.token_ids not in (first.token_ids, backwards.token_ids)
    assert (len(bench.images.calls), bench.images.rereads) == (3, [(98,)])
    gauges = bench.service.gauges()
    assert (gauges["feature_cache_hits_total"], gauges["feature_cache_misses_total"]) == (3 + 2, 3 + 1)
    bench.service.close()


@pytest.mark.parametrize(
    ("inputs", "error", "outcome"),
    [
        ({"top_k": -1}, InvalidRequestError, "invalid"),
        ({"text_input": b"a" * 70}, PromptTooLongError, "invalid"),
    ],
)
def test_faults_of_a_request_are_its_answer(bench: Bench, inputs: Any, error: type[Exception], outcome: str) -> None:
    assert isinstance(bench.ask(**inputs).wait().error, error)
    wait_until(lambda: bench.outcomes() == {outcome: 1})


def test_a_failing_model_fails_its_request_and_no_other(bench: Bench) -> None:
    bench.images.error = EngineError("the vision encoder failed")
    assert str(bench.ask().wait().error) == "the vision encoder failed"
    bench.images.error = RuntimeError("what?")
    error = bench.ask().wait().error
    assert isinstance(error, EngineError)
    assert "internal error occurred: RuntimeError('what?')" in str(error)
    bench.images.error = None
    assert bench.ask(max_tokens=3).wait().finish_reason == "length"


def test_cancelling_a_running_request_frees_its_slot(bench: Bench) -> None:
    first, second = bench.fill()
    waiting = bench.ask(max_tokens=2)
    first.cancelled = True
    bench.step_until(first.ended.is_set)
    bench.decoder.going.set()
    assert waiting.wait().finish_reason == "length"
    assert first.wait().finish_reason == "cancelled"
    assert second.wait().finish_reason == "length"


def test_cancelling_while_features_are_computed(bench: Bench) -> None:
    bench.images.going.clear()
    call, other = bench.ask(), bench.ask(max_tokens=2)
    wait_until(lambda: bench.images.calls)
    call.cancelled = True
    assert call.wait().finish_reason == "cancelled"
    bench.images.going.set()
    assert other.wait().finish_reason == "length"
    assert len(bench.images.calls) == 1


def test_cancelling_by_name(bench: Bench) -> None:
    bench.decoder.going.clear()
    call = bench.ask(name="abc", stream=True, max_tokens=50)
    wait_until(lambda: bench.decoder.prefills)
    twin = bench.ask(name="abc").wait()
    assert str(twin.error) == "blipstream_call must be a new name, but another request has this one"
    assert [bench.service.cancel(name) for name in ("", "other", "abc")] == [False, False, True]
    bench.step_until(call.ended.is_set)
    assert call.wait().finish_reason == "cancelled"
    assert not bench.service.cancel("abc")


def test_bad_words_are_tokenized_where_they_hold_nobody_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    tokenize = Tokenizer.word_sequences

    def watched(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
        threads.append(threading.current_thread().name)
        return tokenize(tokenizer, words)

    monkeypatch.setattr(Tokenizer, "word_sequences", watched)
    assert bench.ask(bad_words=[b"a"], max_tokens=2).wait().error is None
    assert [name.startswith("request-parser") for name in threads] == [True]


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_is_echoed_once(bench: Bench, stream: bool) -> None:
    plain = bench.ask(text_input=b"ab", max_tokens=9, stream=stream).wait()
    echoed = bench.ask(text_input=b"ab", max_tokens=9, stream=stream, exclude_input_in_output=False).wait()
    assert echoed.text == "ab" + plain.text


def test_timeout_while_waiting_for_a_slot(bench: Bench) -> None:
    bench.fill()
    late = bench.ask(timeout=0.05)
    time.sleep(0.1)
    bench.decoder.going.set()
    error = late.wait().error
    assert isinstance(error, RequestTimeoutError)
    assert "for a slot, and its timeout is 0.050 s" in str(error)


def test_timeout_while_waiting_for_features(bench: Bench) -> None:
    bench.images.going.clear()
    error = bench.ask(timeout=0.05).wait().error
    assert isinstance(error, RequestTimeoutError)
    assert "for its image features, and its timeout is 0.050 s" in str(error)


def test_default_timeout() -> None:
    bench = Bench(request_timeout=0.05)
    bench.images.going.clear()
    assert isinstance(bench.ask().wait().error, RequestTimeoutError)
    bench.images.going.set()
    bench.service.close()


def test_a_full_queue_refuses() -> None:
    bench = Bench(queue_size=1)
    running = bench.fill()
    waiting = bench.ask(max_tokens=1)
    refused = bench.ask(max_tokens=1).wait()
    assert isinstance(refused.error, ServerBusyError)
    assert "the queue is full: 3 requests are running or waiting" in str(refused.error)
    bench.decoder.going.set()
    assert waiting.wait().finish_reason == "length"
    assert all(call.wait().finish_reason == "length" for call in running)
    assert bench.ask(max_tokens=1).wait().finish_reason == "length"
    bench.service.close()


def test_gauges_tell_who_runs_and_who_waits(bench: Bench) -> None:
    bench.fill()
    bench.ask(max_tokens=1)
    wait_until(lambda: bench.service.gauges()["waiting_requests"] == 1)
    assert bench.service.gauges()["running_sequences"] == 2
    bench.decoder.going.set()
    wait_until(lambda: bench.service.gauges()["running_sequences"] == 0)
    wait_until(lambda: bench.service.gauges()["waiting_requests"] == 0)


def test_closing_answers_everyone() -> None:
    bench = Bench()
    running = bench.fill()
    waiting = bench.ask()
    bench.images.going.clear()
    computing = bench.ask(image=b"\x07another")
    wait_until(lambda: b"\x07another" in bench.images.calls)
    closing = threading.Thread(target=bench.service.close)
    closing.start()
    assert "shutting down" in str(computing.wait().error)
    bench.decoder.going.set()
    for call in (*running, waiting):
        assert isinstance(call.wait().error, ServerBusyError)
    bench.images.going.set()
    closing.join(60)
    assert not closing.is_alive()
    late = bench.ask().wait()
    assert "shutting down" in str(late.error)


def test_closing_with_grace_lets_running_requests_end() -> None:
    bench = Bench()
    running = bench.fill()
    waiting = bench.ask()
    wait_until(lambda: bench.service.gauges()["waiting_requests"] == 1)
    closing = threading.Thread(target=bench.service.close, args=(60.0,))
    closing.start()
    wait_until(lambda: isinstance(bench.ask().error, ServerBusyError))
    bench.decoder.going.set()
    assert all(call.wait().finish_reason == "length" for call in running)
    assert "shutting down" in str(waiting.wait().error)
    closing.join(60)
    assert not closing.is_alive()


def test_closing_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    bench = Bench()
    bench.ask(max_tokens=3).wait()
    bench.service.close()
    bench.service.close()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_client_out_of_reach_gives_up_its_slot(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    class Unreachable(FakeCall):
        def send(self, answer: Any, *, final: bool) -> None:
            raise RuntimeError("no client")

    call = Unreachable(image=b"\x00image", stream=True, max_tokens=50)
    bench.service.accept(call)
    wait_until(lambda: bench.service.gauges()["running_sequences"] == 0 and bench.outcomes().get("cancelled") == 1)
    assert "a response could not be sent" in caplog.text


def test_many_concurrent_calls_get_their_own_answers(bench: Bench) -> None:
    expected = {i: bench.ask(text_input=b"%d" % i, max_tokens=8).wait().token_ids for i in range(6)}
    calls = [(i % 6, bench.ask(text_input=b"%d" % (i % 6), max_tokens=8, stream=i % 2 == 0)) for i in range(36)]
    for key, call in calls:
        assert call.wait().token_ids == expected[key]
