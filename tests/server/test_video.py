"""InstructBlipVideo behind a real server: four frames a request, each read once and kept by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blipstream_export.build import BuildOptions

from blipstream.triton.server import TritonServer
from tests.server.videos import Reference, ask_concurrently, mixed_asks
from tests.server.wire import ask, png, refusal, runs
from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.checkpoints import make_images
from tests.support.instructblip import save_instructblipvideo
from tests.support.servers import Serving, served

pytestmark = [pytest.mark.server, pytest.mark.slow]

MODELS = ("preprocess", "vision_encoder", "qformer")


@pytest.fixture(scope="module", params=["opt"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return checkpoint_of(save_instructblipvideo, request.param, seed=0)  # with some other seeds logits tie


@pytest.fixture(scope="module")
def serving(checkpoint: Path) -> Iterator[Serving]:
    with served(bundle_of(checkpoint, BuildOptions(max_sequences=4))) as serving:
        yield serving


def test_mixed_videos_equal_the_checkpoint(server: TritonServer, checkpoint: Path) -> None:
    """Sixteen at once out of ten frames, some repeated within a video."""
    asks = mixed_asks()
    before = {model: runs(server, model) for model in MODELS}
    answers = ask_concurrently(server.grpc_url, asks, max_tokens=16)
    reference = Reference(checkpoint)
    for (video, text), answer in zip(asks, answers, strict=True):
        assert answer == reference.generate(video, text, max_new_tokens=16)
    different = {id(frame) for video, _ in asks for frame in video}
    readings = {(id(frame), text) for video, text in asks for frame in video}
    gained = {model: runs(server, model) - before[model] for model in MODELS}
    assert gained == {"preprocess": len(different), "vision_encoder": len(different), "qformer": len(readings)}


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_frames_is_refused(count: int, server: TritonServer) -> None:
    frames = [png(frame) for frame in make_images(count)]
    before = [runs(server, model) for model in MODELS]
    _, message = refusal(lambda: ask(server.grpc_url, image=frames, max_tokens=2))
    assert f"INVALID_ARGUMENT: image must hold 4 files, one for each frame, but it holds {count}" in message
    assert [runs(server, model) for model in MODELS] == before


def test_a_frame_that_is_no_image(server: TritonServer) -> None:
    frames = [png(frame) for frame in make_images(4, seed=8)]
    _, message = refusal(lambda: ask(server.grpc_url, image=[*frames[:2], b"?", frames[3]], max_tokens=2))
    assert "INVALID_ARGUMENT: the image is in no known format" in message
    assert ask(server.grpc_url, image=frames, max_tokens=2).num_output_tokens == 2
