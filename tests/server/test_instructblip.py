"""InstructBLIP behind a real server: faithful, and its image encoder runs once for each image."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from blipstream_client import Client
from blipstream_export.build import BuildOptions

from blipstream.triton.server import TritonServer
from tests.server.faithful import Ask, Reference, ask_concurrently, assert_equal
from tests.server.wire import ask, metric, png, refusal, runs, settled, wait_until
from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.checkpoints import TinySizes, make_images
from tests.support.instructblip import QFORMER_POSITIONS, save_instructblip
from tests.support.servers import Serving, served

pytestmark = [pytest.mark.server, pytest.mark.slow]

INSTRUCTIONS = (
    "",
    "a",
    "What colour is the large circle, and how many children are there?",
    "Describe this photo",
    "the dog and\nthe child: ünïcode",
    "Is there a river?",
    "Question: how many dogs are there? Answer:",
)
"""Of unequal lengths for both tokenizers; the empty one asks for a caption."""

MODELS = ("preprocess", "vision_encoder", "qformer")


@pytest.fixture(scope="module", params=["llama"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return checkpoint_of(save_instructblip, request.param, seed=3)  # with some other seeds logits tie


@pytest.fixture(scope="module")
def serving(checkpoint: Path) -> Iterator[Serving]:
    with served(bundle_of(checkpoint, BuildOptions(max_sequences=5))) as serving:
        yield serving


def counts(server: TritonServer) -> dict[str, int]:
    """Runs of the image models so far."""
    return {model: runs(server, model) for model in MODELS}


def gained(server: TritonServer, before: dict[str, int]) -> dict[str, int]:
    return {model: count - before[model] for model, count in counts(server).items()}


def test_mixed_requests_equal_the_checkpoint(server: TritonServer, checkpoint: Path) -> None:
    """32 at once: images come back with other instructions, and some with the same."""
    images = make_images(6, seed=2)
    asks = [Ask(images[i % 6], INSTRUCTIONS[(i + i // 12) % len(INSTRUCTIONS)]) for i in range(32)]
    before = counts(server)
    answers = ask_concurrently(server.grpc_url, asks, max_tokens=24)
    reference = Reference(checkpoint)
    assert_equal(reference, asks, answers, max_new_tokens=24)
    tokens = {
        (id(ask.image), ask.prompt): tuple(token for chunk in answer for token in chunk.token_ids)
        for ask, answer in zip(asks, answers, strict=True)
    }
    assert len(set(tokens.values())) == len(tokens), "the answers hardly depend on image and instruction"
    assert gained(server, before) == {"preprocess": 6, "vision_encoder": 6, "qformer": len(tokens)}


def test_another_instruction_runs_the_qformer_alone(server: TritonServer) -> None:
    (image,) = (png(picture) for picture in make_images(1, seed=11))
    first = ask(server.grpc_url, image=image, text_input="what is it?", max_tokens=5)
    before = counts(server)
    embeds_hits = settled(server, "blipstream_feature_cache_embeds_hits_total")
    other = ask(server.grpc_url, image=image, text_input="how many are there?", max_tokens=5)
    assert gained(server, before) == {"preprocess": 0, "vision_encoder": 0, "qformer": 1}
    again = ask(server.grpc_url, image=image, text_input="what is it?", max_tokens=5)
    assert gained(server, before) == {"preprocess": 0, "vision_encoder": 0, "qformer": 1}
    assert again.token_ids == first.token_ids != other.token_ids
    wait_until(lambda: metric(server, "blipstream_feature_cache_embeds_hits_total") == embeds_hits + 1)


def test_concurrent_instructions_about_a_new_image_share_the_vit(server: TritonServer) -> None:
    (image,) = (png(picture) for picture in make_images(1, seed=12))
    before = counts(server)
    names = ("hits_total", "misses_total", "embeds_hits_total", "bytes")
    seen = {name: settled(server, f"blipstream_feature_cache_{name}") for name in names}
    with ThreadPoolExecutor(16) as pool:
        replies = list(
            pool.map(
                lambda i: ask(server.grpc_url, image=image, text_input=INSTRUCTIONS[i % 4], max_tokens=4).token_ids,
                range(16),
            )
        )
    assert all(replies[i] == replies[i % 4] for i in range(16))
    assert gained(server, before) == {"preprocess": 1, "vision_encoder": 1, "qformer": 4}
    sizes = TinySizes()
    num_patches = (sizes.image_size // sizes.patch_size) ** 2
    expected = {
        "hits_total": 12,
        "misses_total": 4,
        "embeds_hits_total": 3,
        "bytes": 4 * ((num_patches + 1) * sizes.vision_hidden + 4 * sizes.num_query_tokens * 48),
    }
    wait_until(lambda: metric(server, "blipstream_feature_cache_hits_total") == seen["hits_total"] + 12)
    assert {name: metric(server, f"blipstream_feature_cache_{name}") - seen[name] for name in names} == expected


def test_pixels_are_read_with_instructions_too(server: TritonServer, checkpoint: Path) -> None:
    side = TinySizes().image_size
    pixels = np.random.default_rng(4).normal(size=(1, 3, side, side)).astype(np.float16)
    before = counts(server)
    found = [ask(server.grpc_url, image_input=pixels, text_input=text, max_tokens=12) for text in INSTRUCTIONS[:3]]
    assert gained(server, before) == {"preprocess": 0, "vision_encoder": 1, "qformer": 3}
    reference = Reference(checkpoint)
    for text, reply in zip(INSTRUCTIONS, found, strict=False):
        assert reply.token_ids == reference.generate_from(pixels.astype(np.float32), text, max_new_tokens=12)


def test_an_instruction_that_the_qformer_cannot_hold(server: TritonServer, image: bytes) -> None:
    before = counts(server)
    long = "dog " * (QFORMER_POSITIONS - 1)  # with what frames a text, one too many
    _, message = refusal(lambda: ask(server.grpc_url, image=image, text_input=long, max_tokens=2))
    assert "INVALID_ARGUMENT: the prompt has 41 tokens for the Q-Former, which reads an instruction of at most 40" in (
        message
    )
    assert gained(server, before) == dict.fromkeys(MODELS, 0)


def test_the_qformer_by_itself(server: TritonServer) -> None:
    """Requests of unequal lengths at once: each gets its own answer, and a bad one its own error."""
    rng = np.random.default_rng(7)
    sizes = TinySizes()
    num_tokens = (sizes.image_size // sizes.patch_size) ** 2 + 1
    embeds = rng.normal(size=(1, num_tokens, sizes.vision_hidden)).astype(np.float32)

    def read(ids: list[int]) -> np.ndarray:
        inputs = []
        for name, array, dtype in (
            ("image_embeds", embeds, "FP32"),
            ("qformer_input_ids", np.array([ids]), "INT64"),
            ("qformer_attention_mask", np.ones((1, len(ids)), np.int64), "INT64"),
        ):
            inputs.append(triton.InferInput(name, list(array.shape), dtype))
            inputs[-1].set_data_from_numpy(array)
        with triton.InferenceServerClient(server.grpc_url) as client:
            return client.infer("qformer", inputs).as_numpy("soft_tokens")

    instructions = [rng.integers(0, 150, length).tolist() for length in rng.integers(1, QFORMER_POSITIONS, 24)]
    alone = [read(ids) for ids in instructions[:6]]
    bad = [999]
    with ThreadPoolExecutor(25) as pool:
        futures = [pool.submit(read, ids) for ids in (*instructions, bad, *instructions)]
        results = [future.exception() or future.result() for future in futures]
    assert "must hold numbers from 0 to 149, but one of them is 999" in str(results.pop(24))
    for found, expected in zip(results, alone, strict=False):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    for first, second in zip(results[:24], results[24:], strict=True):
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-4)
    with triton.InferenceServerClient(server.grpc_url) as client:
        statistics = client.get_inference_statistics("qformer").model_stats[0]
    assert any(batch.batch_size > 1 for batch in statistics.batch_stats)


def test_a_question_is_asked_as_the_family_was_shown_it(server: TritonServer) -> None:
    (image,) = (png(picture) for picture in make_images(1, seed=13))
    with Client(server.grpc_url) as client:
        assert client.question_template() == "{}"
        answer = client.ask(image, "what is it?", max_tokens=5)
        assert answer == client.generate(image, "what is it?", max_tokens=5)
