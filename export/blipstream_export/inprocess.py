"""A bundle in this process: images and prompts in, texts out, on the engines and the decode loop that serve it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    IMAGE_EMBEDS,
    MODEL_VERSION,
    PIXEL_VALUES,
    QFORMER,
    SOFT_TOKENS,
    TOKENIZER_FILE,
    VISION_ENCODER,
)
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.request import Chunk, GenerationRequest, Prompt, SamplingParams
from blipstream.decoding.text import Tokenizer
from blipstream.engines import load_decoder, open_engine
from blipstream.errors import BundleError
from blipstream.instructions import InstructionEncoder, instruction_inputs, pad_instructions
from blipstream.manifest import Manifest
from blipstream.preprocess import ImageTransform


class InProcess:
    """A bundle as a function from images and prompts to greedy texts; a context manager.

    Args:
        bundle: its folder.
        threads: of each engine.

    Raises:
        BundleError: the bundle cannot be read, or wants several frames a request.
    """

    def __init__(self, bundle: Path, *, threads: int | None = None) -> None:
        self._manifest = manifest = Manifest.load(bundle)
        if manifest.vision.num_frames > 1:
            raise BundleError(
                f"{bundle} reads {manifest.vision.num_frames} frames a request, and single images are run here"
            )
        self._transform = ImageTransform(manifest.image)
        folder = bundle / BLIP2 / MODEL_VERSION
        self._tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
        self._instructions = InstructionEncoder.load(folder, manifest)
        with ExitStack() as stack:
            self._vision, self._qformer = (
                stack.enter_context(open_engine(manifest, bundle / name / MODEL_VERSION, GRAPH_FILE, threads=threads))
                for name in (VISION_ENCODER, QFORMER)
            )
            self._decoder = load_decoder(
                manifest.decoder, lambda file: open_engine(manifest, folder, file, threads=threads)
            )
            stack.callback(self._decoder.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def generate(
        self, images: Sequence[Image.Image], prompts: Sequence[str], max_tokens: int | None = None
    ) -> list[str]:
        """Greedy texts, without space around them; all are in flight together.

        Args:
            images: one for each prompt; an object that comes several times is read once.
            prompts: an empty one asks for a caption.
            max_tokens: new tokens at most; by default the checkpoint's.
        """
        soft_tokens = self._soft_tokens(images, prompts)
        loop = DecodeLoop(
            self._decoder,
            self._tokenizer,
            eos_token_ids=self._manifest.generation.eos_token_ids,
            image_token_id=self._manifest.generation.image_token_id,
            config=LoopConfig(max_waiting=len(prompts)),
        )
        params = SamplingParams(
            max_tokens=max_tokens or self._manifest.generation.max_new_tokens,
            repetition_penalty=self._manifest.generation.repetition_penalty,
        )
        chunks: list[list[Chunk]] = [[] for _ in prompts]
        for index, (soft, text) in enumerate(zip(soft_tokens, prompts, strict=True)):
            ids = self._tokenizer.encode(text) if text else self._manifest.generation.empty_prompt_ids
            loop.submit(GenerationRequest(str(index), Prompt(soft, tuple(ids)), params, on_chunk=chunks[index].append))
        loop.close()  # drains: returns when every text is complete
        return [_text(answer) for answer in chunks]

    def _soft_tokens(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """(Q, D) of each image and prompt; an image is encoded once, and read once where prompts are not read."""
        distinct = list({id(image): image for image in images}.values())
        row = {id(image): index for index, image in enumerate(distinct)}
        pixels = (np.stack([self._transform(image) for image in part]) for part in self._parts(distinct))
        embeds = np.concatenate([self._vision.run({PIXEL_VALUES.name: x})[IMAGE_EMBEDS.name].copy() for x in pixels])
        rows = [row[id(image)] for image in images]
        if self._instructions is None:
            read = self._read([{IMAGE_EMBEDS.name: embeds[part]} for part in self._parts(range(len(distinct)))])
            return [read[index] for index in rows]
        section, encode = self._manifest.qformer.instruction, self._instructions.encode
        assert section is not None
        asked = [instruction_inputs(encode(prompt)) for prompt in prompts]
        return self._read(
            [
                {
                    IMAGE_EMBEDS.name: embeds[[rows[i] for i in part]],
                    **pad_instructions([asked[i] for i in part], section),
                }
                for part in self._parts(range(len(rows)))
            ]
        )

    def _parts(self, items: Sequence[Any]) -> list[list[Any]]:
        """As many images, or instructions, as are read at once."""
        size = self._manifest.max_batch
        return [list(items[first : first + size]) for first in range(0, len(items), size)]

    def _read(self, batches: Sequence[dict[str, Any]]) -> list[npt.NDArray[np.float32]]:
        return [soft for inputs in batches for soft in self._qformer.run(inputs)[SOFT_TOKENS.name].copy()]


def _text(answer: Sequence[Chunk]) -> str:
    if answer[-1].error is not None:
        raise answer[-1].error
    return "".join(chunk.text for chunk in answer).strip()
