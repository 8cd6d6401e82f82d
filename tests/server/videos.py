"""Videos for an InstructBlipVideo server, asked for together, and the checkpoint's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blipstream_client import Client
from PIL import Image

from tests.server.faithful import CLIENTS
from tests.server.wire import PATIENCE_S
from tests.support.checkpoints import make_images

TEXTS = ("", "what happens?", "Describe the video, please", "a")
Ask = tuple[list[Image.Image], str]


def mixed_asks(steps: Sequence[int] = (1, 3, 5, 0)) -> list[Ask]:
    """Four videos of four frames for each of ``steps``, out of ten frames, with prompts and without; with a step of 0
    a frame is repeated."""
    frames = make_images(10, seed=3)
    videos = [[frames[(i * step) % 10] for i in range(start, start + 4)] for step in steps for start in range(4)]
    return [(video, TEXTS[i % len(TEXTS)]) for i, video in enumerate(videos)]


def ask_concurrently(url: str, asks: Sequence[Ask], max_tokens: int) -> list[list[int]]:
    """The token ids of each answer, from as many clients at once as there are for images."""

    def work(ask: Ask) -> list[int]:
        with Client(url, timeout=PATIENCE_S) as client:
            return list(client.generate(ask[0], ask[1], max_tokens=max_tokens).token_ids)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(work, asks))


class Reference:
    """The checkpoint in transformers, with frames that Pillow has resized (its own processor needs torchvision)."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer, BlipImageProcessor, InstructBlipVideoForConditionalGeneration

        self._model = InstructBlipVideoForConditionalGeneration.from_pretrained(checkpoint).eval()
        side = self._model.config.vision_config.image_size
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
