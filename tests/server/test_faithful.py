"""The server's greedy text is the checkpoint's own in fp32, token for token, as transformers computes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from blipstream_demo import evaluation, scenes
from PIL import Image

from blipstream.triton.server import TritonServer
from tests.server.faithful import Ask, Reference, ask_concurrently, assert_equal
from tests.support.bundles import bundle_of
from tests.support.checkpoints import PROMPTS, make_images
from tests.support.servers import START_S, Serving, served
from tests.support.variants import VARIANTS, variant_bundle, variant_checkpoint

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    # transformers' remark on its own default of 20 new tokens, which is what is compared here
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]

DEMO = Path(__file__).resolve().parents[2] / "demo"
DEMO_CHECKPOINT = DEMO / "checkpoint"


# --- the demo checkpoint ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with served(bundle_of(DEMO_CHECKPOINT)) as serving:
        yield serving


def demo_asks(count: int) -> list[Ask]:
    """Captions and questions of every kind, in turn, about ``count`` different test images."""
    asks = []
    for i, scene in enumerate(scenes.test_scenes(count)):
        prompts = ["", *(question.prompt for question in scenes.questions(scene)), "this is a picture of"]
        asks.append(Ask(scenes.render(scene), prompts[i % len(prompts)]))
    return asks


def test_two_hundred_images_by_sixteen_clients_equal_the_checkpoint(server: TritonServer) -> None:
    asks = demo_asks(200)
    answers = ask_concurrently(server.grpc_url, asks)
    assert_equal(Reference(DEMO_CHECKPOINT), asks, answers)
    assert {chunks[-1].finish_reason for chunks in answers} >= {"eos"}


def test_penalties_and_limits_equal_the_checkpoint(server: TritonServer) -> None:
    asks = demo_asks(32)
    reference = Reference(DEMO_CHECKPOINT)
    answers = ask_concurrently(server.grpc_url, asks, repetition_penalty=1.5, min_tokens=6, max_tokens=12)
    assert_equal(reference, asks, answers, repetition_penalty=1.5, min_new_tokens=6, max_new_tokens=12)


def test_served_accuracy_is_the_model_cards(server: TritonServer) -> None:
    """Captions and answers for 200 of the 1,000 test scenes, judged by the code that made the model card."""
    evaluated = json.loads((DEMO / "evaluation.json").read_text())
    card = evaluated["generation"]["checkpoint"]

    def generate(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        asks = [Ask(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        answers = ask_concurrently(server.grpc_url, asks)
        return ["".join(chunk.text for chunk in chunks).strip() for chunks in answers]

    shown = scenes.test_scenes(200)
    figures = evaluation.generation(generate, shown, [scenes.render(scene) for scene in shown])
    for found, measured in (
        *((figures["captions"][key], card["captions"][key]) for key in ("right", "exact")),
        *((figures["questions"][kind], card["questions"][kind]) for kind in card["questions"]),
    ):
        assert 100 < found["n"] <= 200
        assert found["all"] == pytest.approx(measured["all"], abs=0.04)  # three deviations of the least certain


# --- random checkpoints of odd sizes ---------------------------------------------------------------------------------


@pytest.fixture(params=VARIANTS)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def variant_server(language: str) -> Iterator[TritonServer]:
    with TritonServer(variant_bundle(language), start_timeout=START_S) as server:
        yield server


def test_random_variants_equal_the_checkpoint(variant_server: TritonServer, language: str) -> None:
    asks = [Ask(image, PROMPTS[i % len(PROMPTS)]) for i, image in enumerate(make_images(32, seed=1))]
    answers = ask_concurrently(variant_server.grpc_url, asks, max_tokens=24)
    assert_equal(Reference(variant_checkpoint(language)), asks, answers, max_new_tokens=24)
