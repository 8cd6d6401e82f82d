"""Text of a real server: streamed, whole, sampled, stopped; in whatever company."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blipstream.manifest import Manifest
from blipstream.preprocess import ImageTransform
from blipstream.triton.server import TritonServer
from tests.server.conftest import ROW_TOKENS, SLOTS
from tests.server.wire import LONG, Reply, ask, ask_unary, generate

pytestmark = pytest.mark.server


def ask_at_once(server: TritonServer, requests: Sequence[dict[str, Any]]) -> list[list[Reply]]:
    """The responses of several requests that are sent at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda inputs: generate(server.grpc_url, **inputs), requests))


def joined(replies: Sequence[Reply]) -> tuple[list[int], str]:
    return [token for reply in replies for token in reply.token_ids], "".join(reply.text for reply in replies)


def test_streamed_text_is_the_whole_text(server: TritonServer, image: bytes) -> None:
    inputs = {"image": image, "text_input": "Question: what colour?", "max_tokens": LONG, "min_tokens": LONG}
    whole = ask(server.grpc_url, **inputs)
    streamed = generate(server.grpc_url, **inputs, stream=True)
    assert whole.finish_reason == "length"
    assert whole.num_output_tokens == len(whole.token_ids) == LONG
    assert joined(streamed) == (whole.token_ids, whole.text)
    assert len(streamed) > 1
    assert [reply.finish_reason for reply in streamed[:-1]] == [""] * (len(streamed) - 1)
    last = streamed[-1]
    assert (last.finish_reason, last.num_output_tokens) == ("length", LONG)
    assert last.num_input_tokens == whole.num_input_tokens


def test_unary_clients_get_the_same(server: TritonServer, image: bytes) -> None:
    inputs = {"image": image, "text_input": "a", "max_tokens": 12}
    expected = ask(server.grpc_url, **inputs)
    for stream in (False, True):
        reply = ask_unary(server.grpc_url, **inputs, stream=stream)
        assert (reply.token_ids, reply.text) == (expected.token_ids, expected.text)
        assert reply.finish_reason == expected.finish_reason


def test_unary_clients_are_served_at_once(server: TritonServer, images: list[bytes]) -> None:
    """More of them than there are slots, each with its own answer."""
    expected = [ask(server.grpc_url, image=image, max_tokens=9).token_ids for image in images]
    with ThreadPoolExecutor(len(images)) as pool:
        replies = list(pool.map(lambda image: ask_unary(server.grpc_url, image=image, max_tokens=9), images))
    assert [reply.token_ids for reply in replies] == expected


def test_plain_captioning_is_the_checkpoints_own(server: TritonServer, checkpoint: Path, bundle: Path) -> None:
    """Empty or missing text, image_input as FP16 pixels: what ``generate(pixel_values)`` gives for those pixels."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    from tests.support.checkpoints import make_images

    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint).eval()
    transform = ImageTransform(Manifest.load(bundle).image)
    for picture in make_images(4, seed=9):
        pixels = transform(picture)[None].astype(np.float16)
        generated = model.generate(torch.from_numpy(pixels.astype(np.float32)), do_sample=False, max_new_tokens=15)
        expected = generated[0, model.config.num_query_tokens + 1 :].tolist()
        for text in ({}, {"text_input": ""}):
            assert ask(server.grpc_url, image_input=pixels, max_tokens=15, **text).token_ids == expected


def test_many_requests_in_few_slots_are_as_if_alone(server: TritonServer, images: list[bytes]) -> None:
    requests = [
        {"image": image, "text_input": text, "max_tokens": count, "stream": bool(count % 2)}
        for image in images[:4]
        for text, count in (("", 5), ("a", 18), ("this is a photo of", 11))
    ]
    assert len(requests) > 3 * SLOTS
    alone = [joined(generate(server.grpc_url, **request)) for request in requests]
    together = [joined(replies) for replies in ask_at_once(server, requests)]
    assert together == alone
    assert len({text for _, text in alone}) > 1


def test_a_seed_reproduces_a_sample_in_any_company(server: TritonServer, images: list[bytes]) -> None:
    sample = {"image": images[0], "temperature": 1.5, "top_k": 40, "top_p": 0.95, "max_tokens": 20, "min_tokens": 20}
    alone = ask(server.grpc_url, **sample, random_seed=7).token_ids
    others = [{**sample, "image": image, "random_seed": seed} for seed, image in enumerate(images, 100)]
    replies = ask_at_once(server, [*others[:3], {**sample, "random_seed": 7}, *others[3:]])
    assert replies[3][0].token_ids == alone
    assert ask(server.grpc_url, **sample, random_seed=8).token_ids != alone


def test_top_k_of_one_is_greedy(server: TritonServer, image: bytes) -> None:
    greedy = ask(server.grpc_url, image=image, max_tokens=10)
    assert ask(server.grpc_url, image=image, max_tokens=10, top_k=1, temperature=2.0).token_ids == greedy.token_ids


def test_a_stop_word_ends_the_text(server: TritonServer, image: bytes) -> None:
    whole = ask(server.grpc_url, image=image, max_tokens=40, min_tokens=40)
    word = whole.text[len(whole.text) // 2 :][:3]
    reply = ask(server.grpc_url, image=image, max_tokens=40, min_tokens=40, stop_words=["never in it", word])
    assert reply.finish_reason == "stop"
    assert reply.text == whole.text[: whole.text.index(word)]
    streamed = generate(server.grpc_url, image=image, max_tokens=40, min_tokens=40, stop_words=[word], stream=True)
    assert joined(streamed)[1] == reply.text


def test_an_end_token_ends_the_text(server: TritonServer, images: list[bytes]) -> None:
    """Sampled wide, some texts end early; their reason is ``eos`` and their last token the end token."""
    replies = [
        ask(server.grpc_url, image=images[0], max_tokens=500, temperature=20.0, top_k=0, random_seed=seed)
        for seed in range(20)
    ]
    ended = [reply for reply in replies if reply.finish_reason == "eos"]
    assert ended
    assert all(reply.token_ids[-1] == 2 and reply.num_output_tokens < 500 for reply in ended)


def test_log_probs(server: TritonServer, image: bytes) -> None:
    replies = generate(server.grpc_url, image=image, max_tokens=6, return_log_probs=True, stream=True)
    parts = [reply.result.as_numpy("output_log_probs")[0, 0].tolist() for reply in replies]
    values = [value for part in parts for value in part]
    assert len(values) == replies[-1].num_output_tokens
    assert all(value <= 0 for value in values)
    total = replies[-1].result.as_numpy("cum_log_probs")
    assert total.shape == (1, 1)
    assert total[0, 0] == pytest.approx(sum(values), rel=1e-5)
    assert ask(server.grpc_url, image=image, max_tokens=6).result.as_numpy("cum_log_probs") is None


def test_max_tokens_beyond_the_row_ends_with_the_row(server: TritonServer, image: bytes) -> None:
    text = " ".join(["photo of a cat"] * 700)
    reply = ask(server.grpc_url, image=image, text_input=text, max_tokens=100_000, min_tokens=100_000)
    assert reply.finish_reason == "length"
    assert reply.num_input_tokens + reply.num_output_tokens == ROW_TOKENS


def test_the_image_is_the_same_however_it_is_sent(server: TritonServer, image: bytes) -> None:
    import base64

    from tests.server.wire import data_url

    expected = ask(server.grpc_url, image=image, max_tokens=8).token_ids
    for sent in (base64.b64encode(image), data_url(image), base64.encodebytes(image)):
        assert ask(server.grpc_url, image=sent, max_tokens=8).token_ids == expected


def test_pictures_matter(server: TritonServer, images: list[bytes]) -> None:
    answers = {tuple(ask(server.grpc_url, image=image, max_tokens=12, min_tokens=12).token_ids) for image in images}
    assert len(answers) > 1
