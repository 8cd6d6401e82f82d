"""InstructBlipVideo behind a real server: four frames a request, each read once and kept by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blipstream_client import Client
from PIL import Image

from blipstream.triton.server import TritonServer
from tests.checkpoints import TinySizes, make_images
from tests.instructblip import save_instructblipvideo
from tests.server.wire import ask, png, refusal, runs

pytestmark = [pytest.mark.server, pytest.mark.slow]

TEXTS = ("", "what happens?", "Describe the video, please", "a")
MODELS = ("preprocess", "vision_encoder", "qformer")


@pytest.fixture(scope="module", params=["opt", "t5"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "checkpoint"
    return save_instructblipvideo(folder, request.param, seed=0)  # with some other seeds logits tie


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[TritonServer]:
    from blipstream_export.build import BuildOptions, build

    bundle = checkpoint.parent / "bundle"
    build(str(checkpoint), bundle, BuildOptions(max_sequences=4))
    with TritonServer(bundle, verbose=True) as server:
        yield server


class Reference:
    """The checkpoint in transformers, with frames that Pillow has resized (its own processor needs torchvision)."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer, BlipImageProcessor, InstructBlipVideoForConditionalGeneration

        side = TinySizes().image_size
        self._model = InstructBlipVideoForConditionalGeneration.from_pretrained(checkpoint).eval()
        self._images = BlipImageProcessor(size={"height": side, "width": side})
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._qformer_tokenizer = AutoTokenizer.from_pretrained(checkpoint / "qformer_tokenizer")

    def generate(self, frames: Sequence[Image.Image], text: str, **options: Any) -> list[int]:
        import torch

        instruction = self._qformer_tokenizer(text, return_tensors="pt")
        video = [self._model.config.video_token_index] * self._model.config.num_query_tokens * len(frames)
        output = self._model.generate(
            pixel_values=self._images(list(frames), return_tensors="pt")["pixel_values"][None],
            qformer_input_ids=instruction["input_ids"],
            qformer_attention_mask=instruction["attention_mask"],
            input_ids=torch.tensor([[*video, *self._tokenizer(text)["input_ids"]]]),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        tokens: list[int] = output.sequences[0, -len(output.logits) :].tolist()
        return tokens


def test_mixed_videos_equal_the_checkpoint(server: TritonServer, checkpoint: Path) -> None:
    """Sixteen at once out of ten frames, some repeated within a video."""
    frames = make_images(10, seed=3)
    videos = [[frames[(i * step) % 10] for i in range(start, start + 4)] for step in (1, 3, 5, 0) for start in range(4)]
    asks = [(video, TEXTS[i % len(TEXTS)]) for i, video in enumerate(videos)]
    before = {model: runs(server, model) for model in MODELS}

    def work(ask: tuple[list[Image.Image], str]) -> list[int]:
        with Client(server.grpc_url, timeout=300) as client:
            return list(client.generate(ask[0], ask[1], max_tokens=16).token_ids)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(work, asks))
    reference = Reference(checkpoint)
    for (video, text), answer in zip(asks, answers, strict=True):
        assert answer == reference.generate(video, text, max_new_tokens=16)
    different = {id(frame) for video in videos for frame in video}
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
