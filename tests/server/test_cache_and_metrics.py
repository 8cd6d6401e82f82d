"""The feature cache, seen from outside; and the metrics."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton

from blipstream.triton.server import TritonServer
from tests.server.wire import ask, generate, metric, metrics, png, runs, settled, wait_until
from tests.support.checkpoints import TinySizes, make_images

pytestmark = pytest.mark.server

IMAGE_MODELS = ("preprocess", "vision_encoder")


def test_a_repeated_image_runs_neither_vit_nor_qformer(server: TritonServer) -> None:
    (image,) = (png(picture) for picture in make_images(1, seed=1001))
    models = ("preprocess", "vision_encoder", "qformer")
    text = base64.b64encode(image)  # is kept under a key of its own
    first = ask(server.grpc_url, image=image, max_tokens=5)
    assert ask(server.grpc_url, image=text, max_tokens=5).token_ids == first.token_ids
    before = [runs(server, model) for model in models]
    hits = settled(server, "blipstream_feature_cache_hits_total")
    for sent in (image, text, image):
        assert ask(server.grpc_url, image=sent, max_tokens=5).token_ids == first.token_ids
    ask(server.grpc_url, image=image, text_input="another question", max_tokens=5, stream=False)
    assert [runs(server, model) for model in models] == before
    wait_until(lambda: metric(server, "blipstream_feature_cache_hits_total") == hits + 4)


def test_a_further_question_is_read_behind_what_is_known_of_the_image(server: TritonServer, image: bytes) -> None:
    """The answers are those of a server that has never seen the image: a new one in the middle of others."""
    questions = ["what is this", "how many", "a"]
    (new,) = (png(picture) for picture in make_images(1, seed=1101))
    hits, size = (settled(server, f"blipstream_prefix_cache_{name}") for name in ("hits_total", "bytes"))
    known = [ask(server.grpc_url, image=new, text_input=question, max_tokens=8).token_ids for question in questions]
    wait_until(lambda: metric(server, "blipstream_prefix_cache_hits_total") == hits + 2)
    assert metric(server, "blipstream_prefix_cache_bytes") > size
    with ThreadPoolExecutor(3) as pool:
        together = pool.map(
            lambda question: ask(server.grpc_url, image=new, text_input=question, max_tokens=8).token_ids, questions
        )
        assert list(together) == known
    other = ask(server.grpc_url, image=image, text_input=questions[1], max_tokens=8).token_ids
    assert ask(server.grpc_url, image=new, text_input=questions[1], max_tokens=8).token_ids == known[1]
    assert ask(server.grpc_url, image=image, text_input=questions[1], max_tokens=8).token_ids == other


def test_a_new_image_runs_each_model_once(server: TritonServer) -> None:
    (image,) = (png(picture) for picture in make_images(1, seed=1002))
    models = ("preprocess", "vision_encoder", "qformer")
    before = [runs(server, model) for model in models]
    misses, size = (settled(server, f"blipstream_feature_cache_{name}") for name in ("misses_total", "bytes"))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: ask(server.grpc_url, image=image, max_tokens=4).token_ids, range(8)))
    assert all(tokens == replies[0] for tokens in replies)
    assert [runs(server, model) for model in models] == [count + 1 for count in before]
    wait_until(lambda: metric(server, "blipstream_feature_cache_misses_total") == misses + 1)
    assert metric(server, "blipstream_feature_cache_bytes") == size + TinySizes().num_query_tokens * 48 * 4


def test_pixels_are_kept_as_well(server: TritonServer) -> None:
    side = TinySizes().image_size
    pixels = np.random.default_rng(4).normal(size=(1, 3, side, side)).astype(np.float16)
    first = ask(server.grpc_url, image_input=pixels, max_tokens=5)
    before = runs(server, "vision_encoder"), runs(server, "preprocess")
    assert ask(server.grpc_url, image_input=pixels, max_tokens=5).token_ids == first.token_ids
    assert (runs(server, "vision_encoder"), runs(server, "preprocess")) == before


def test_concurrent_new_images_share_batches(server: TritonServer) -> None:
    """Batches of more than one image run when many arrive at once; on a busy machine it may take a second try."""

    def largest_batch() -> int:
        with triton.InferenceServerClient(server.grpc_url) as client:
            statistics = [client.get_inference_statistics(model).model_stats[0] for model in IMAGE_MODELS]
        return max(batch.batch_size for model in statistics for batch in model.batch_stats)

    for attempt in range(5):
        pictures = [png(picture) for picture in make_images(24, seed=1003 + attempt)]
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda image: ask(server.grpc_url, image=image, max_tokens=1), pictures))
        if largest_batch() > 1:
            return
    pytest.fail("every image ran alone")


def test_a_failed_image_is_not_kept(server: TritonServer) -> None:
    (image,) = (png(picture) for picture in make_images(1, seed=1004))
    before = settled(server, "blipstream_feature_cache_bytes")
    for _ in range(2):
        with pytest.raises(triton.InferenceServerException, match="truncated or damaged"):
            ask(server.grpc_url, image=image[:-200])
    assert settled(server, "blipstream_feature_cache_bytes") == before


def test_metrics_tell_what_happens(server: TritonServer, image: bytes) -> None:
    def read() -> dict[str, float]:
        return {
            "tokens": metric(server, "blipstream_generated_tokens_total"),
            "prompts": metric(server, "blipstream_prompt_tokens_total"),
            "first tokens": metric(server, "blipstream_time_to_first_token_seconds_count"),
            "queued": metric(server, "blipstream_queue_seconds_count"),
            "ended": metric(server, "blipstream_requests_total", outcome="length"),
            "invalid": metric(server, "blipstream_requests_total", outcome="invalid"),
        }

    settled(server, "blipstream_generated_tokens_total")
    before = read()
    reply = ask(server.grpc_url, image=image, max_tokens=700, min_tokens=700)
    with pytest.raises(triton.InferenceServerException):
        ask(server.grpc_url, image=b"")
    expected = {
        "tokens": before["tokens"] + 700,
        "prompts": before["prompts"] + reply.num_input_tokens,
        "first tokens": before["first tokens"] + 1,
        "queued": before["queued"] + 1,
        "ended": before["ended"] + 1,
        "invalid": before["invalid"] + 1,
    }
    wait_until(lambda: read()["ended"] > before["ended"] and read()["invalid"] > before["invalid"])
    settled(server, "blipstream_generated_tokens_total")
    assert read() == expected
    samples = metrics(server)
    assert metric(server, "blipstream_tokens_per_second") > 0
    assert any(name.startswith("blipstream_time_to_first_token_seconds_bucket{") for name in samples)
    assert metric(server, "blipstream_time_to_first_token_seconds_sum") > 0
    assert metric(server, "blipstream_request_seconds_sum") > metric(
        server, "blipstream_time_to_first_token_seconds_sum"
    )
    assert metric(server, "blipstream_running_sequences") == 0
    assert any(name.startswith("nv_inference_request_success") for name in samples)


def test_the_rate_of_an_idle_server_falls_to_zero(server: TritonServer, image: bytes) -> None:
    generate(server.grpc_url, image=image, max_tokens=5)
    wait_until(lambda: metric(server, "blipstream_tokens_per_second") == 0)
