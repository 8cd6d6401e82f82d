"""Asking a server and the checkpoint itself the same things, and comparing token for token."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipstream_client import Client, TextChunk
from PIL import Image

from tests.server.wire import PATIENCE_S, png

CLIENTS = 16


@dataclass(frozen=True)
class Ask:
    """One image and prompt; an empty prompt asks for a caption."""

    image: Image.Image
    prompt: str


class Reference:
    """The checkpoint in transformers: one request at a time, so that no padding and no batch can blur it.

    BLIP-2 is asked for a caption without a prompt, InstructBLIP, whose Q-Former needs one, with an empty prompt.
    """

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
        self._processor = AutoProcessor.from_pretrained(checkpoint)
        self._instructed = hasattr(self._processor, "qformer_tokenizer")

    def generate(self, ask: Ask, **options: Any) -> tuple[list[int], str]:
        """New token ids, and their text."""
        text = {"text": ask.prompt} if ask.prompt or self._instructed else {}
        tokens = self._generate(self._processor(images=ask.image, return_tensors="pt", **text), options)
        return tokens, self._processor.decode(tokens, skip_special_tokens=True)

    def generate_from(self, pixels: Any, prompt: str, **options: Any) -> list[int]:
        """New token ids for ``pixel_values`` (1, 3, S, S) in place of an image."""
        import torch

        blank = Image.new("RGB", (8, 8))
        inputs = self._processor(images=blank, text=prompt, return_tensors="pt")
        return self._generate({**inputs, "pixel_values": torch.from_numpy(pixels)}, options)

    def _generate(self, inputs: Any, options: Any) -> list[int]:
        output = self._model.generate(
            **inputs, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
        tokens: list[int] = output.sequences[0, -len(output.logits) :].tolist()
        return tokens


def ask_concurrently(url: str, asks: Sequence[Ask], **options: Any) -> list[list[TextChunk]]:
    """The streamed chunks of each request, sent by 16 clients that each have a connection of their own."""

    def work(worker: int) -> list[list[TextChunk]]:
        with Client(url, timeout=PATIENCE_S) as client:
            return [list(client.stream(png(ask.image), ask.prompt, **options)) for ask in asks[worker::CLIENTS]]

    with ThreadPoolExecutor(CLIENTS) as pool:
        parts = list(pool.map(work, range(CLIENTS)))
    return [parts[i % CLIENTS][i // CLIENTS] for i in range(len(asks))]


def assert_equal(reference: Reference, asks: Sequence[Ask], answers: Sequence[list[TextChunk]], **options: Any) -> None:
    for ask, chunks in zip(asks, answers, strict=True):
        tokens, text = reference.generate(ask, **options)
        assert [token for chunk in chunks for token in chunk.token_ids] == tokens, ask.prompt
        assert "".join(chunk.text for chunk in chunks) == text.strip()
        assert chunks[-1].num_output_tokens == len(tokens)
