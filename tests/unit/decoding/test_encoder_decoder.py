"""The decode loop on a decoder behind an encoder: prompt and answer have rows of their own."""

from __future__ import annotations

import numpy as np
import pytest

from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.request import FinishReason, Prompt, SamplingParams, prefilled_tokens
from blipstream.errors import InvalidRequestError, PromptTooLongError
from tests.unit.decoding.fakes import EOS, START, Client, FakeEncoderDecoder, byte_tokenizer, make_prompt, run


def make_loop(decoder: FakeEncoderDecoder, **options) -> DecodeLoop:
    return DecodeLoop(decoder, byte_tokenizer(), eos_token_ids=[EOS], **options)


def submit(loop: DecodeLoop, prompt: Prompt | None = None, **params) -> Client:
    client = Client(prompt or make_prompt(0), SamplingParams(**{"max_tokens": 10, **params}))
    loop.submit(client.request)
    return client


def greedy_alone(prompt: Prompt, max_tokens: int) -> list[int]:
    """Greedy tokens of one sequence, computed without a loop."""
    decoder, tokens = FakeEncoderDecoder(), []
    while len(tokens) < max_tokens and EOS not in tokens:
        tokens.append(int(decoder.logits([*decoder.history(prompt), *tokens]).argmax()))
    return tokens


def test_a_row_holds_the_prompt_or_the_start_token_after_a_prefill():
    assert prefilled_tokens(make_prompt(0, 2, 5), None) == 7
    assert prefilled_tokens(make_prompt(0, 2, 5), START) == 1


def test_an_answer_has_the_whole_row_whatever_the_prompt():
    for num_text in (1, 30):
        loop = make_loop(FakeEncoderDecoder(max_tokens=13))
        client = submit(loop, make_prompt(1, num_text=num_text), max_tokens=1000)
        run(loop)
        assert client.token_ids == greedy_alone(client.request.prompt, 12)  # the start token takes the thirteenth place
        assert client.finish_reason is FinishReason.LENGTH


def test_the_start_token_is_not_part_of_the_answer():
    loop = make_loop(FakeEncoderDecoder())
    client = submit(loop, max_tokens=3)
    run(loop)
    assert [chunk.num_output_tokens for chunk in client.chunks] == [1, 2, 3]
    assert client.chunks[-1].num_input_tokens == 5  # soft tokens and text, as ever


def test_a_prompt_may_be_as_long_as_the_encoder_reads():
    loop = make_loop(FakeEncoderDecoder(max_tokens=5, max_prompt_tokens=12))
    client = submit(loop, make_prompt(2, num_text=10), max_tokens=4)
    run(loop)
    assert len(client.token_ids) == 4
    message = "the prompt has 13 tokens, 2 of them for the image, and at most 12 can be read"
    with pytest.raises(PromptTooLongError, match=message):
        submit(loop, make_prompt(2, num_text=11))
    with pytest.raises(InvalidRequestError, match="the prompt must hold at least one token after the soft tokens"):
        submit(loop, make_prompt(2, num_text=0))
    assert not loop.step()


class Preferring(FakeEncoderDecoder):
    """Prefers some tokens over others, whatever came before."""

    def __init__(self, *tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def logits(self, history):
        logits = np.zeros(self.vocab_size, np.float32)
        logits[list(self.tokens)] = np.arange(len(self.tokens), 0, -1)
        return logits


def test_the_repetition_penalty_sees_the_start_token_and_not_the_prompt():
    """As in transformers: the prompt is the encoder's, and the decoder's own ids begin with the start token."""
    prompt = make_prompt(3)
    second = prompt.token_ids[0]
    assert second != START
    loop = make_loop(Preferring(START, second), image_token_id=second)
    plain, penalised = submit(loop, prompt, max_tokens=1), submit(loop, prompt, max_tokens=1, repetition_penalty=10.0)
    run(loop)
    assert (plain.token_ids, penalised.token_ids) == ([START], [second])


def test_banned_words_may_begin_with_the_start_token():
    loop = make_loop(Preferring(ord("b"), ord("c")))
    client = submit(loop, max_tokens=2, bad_words=(chr(START) + "b",))
    run(loop)
    assert client.text == "cb"


def test_rows_move_with_their_prompts():
    """Sequences of unequal prompts and answers share three rows; whoever ends first gives its row away."""
    loop = make_loop(FakeEncoderDecoder(max_sequences=3), config=LoopConfig(prefill_budget=30))
    lengths = (2, 17, 9, 4, 25, 1, 12)
    clients = [
        submit(loop, make_prompt(seed, num_text=1 + 5 * seed % 23), max_tokens=length)
        for seed, length in enumerate(lengths)
    ]
    run(loop)
    for client, length in zip(clients, lengths, strict=True):
        assert client.token_ids == greedy_alone(client.request.prompt, length)


def test_the_budget_of_a_prefill_counts_the_prompt():
    decoder = FakeEncoderDecoder(max_sequences=8)
    loop = make_loop(decoder, config=LoopConfig(prefill_budget=50))
    for seed in range(6):
        submit(loop, make_prompt(seed, num_text=18), max_tokens=3)  # 20 tokens each
    loop.step()
    assert decoder.prefills == [2]
