"""How often a bundle of the demo checkpoint is right about the demo's test scenes, in process and without a server.

    python -m benchmarks.accuracy BUNDLE [BUNDLE ...] [--scenes 1000]

Prints one row a bundle: captions right, answers right, each over all scenes; with several bundles, the share of texts
that equal those of the first as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import workload  # noqa: F401  (puts the demo's folder on the path)
from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    MODEL_VERSION,
    PIXEL_VALUES,
    QFORMER,
    SOFT_TOKENS,
    TOKENIZER_FILE,
    VISION_ENCODER,
    Manifest,
)
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.request import Chunk, GenerationRequest, Prompt, SamplingParams
from blipstream.decoding.text import Tokenizer
from blipstream.engines import create_engine, load_decoder
from blipstream.preprocess import ImageTransform

from blipstream_demo import evaluation, scenes  # isort: skip  # importable once the workload's module is

NEW_TOKENS = 32
"""As in the demo's own evaluation."""


class InProcess:
    """A bundle as the function from images and prompts to texts that the demo's evaluation judges.

    Each image is encoded once, when it is first seen.
    """

    def __init__(self, bundle: Path, *, threads: int | None = None) -> None:
        self._manifest = manifest = Manifest.load(bundle)
        self._transform = ImageTransform(manifest.image)
        self._stack = ExitStack()
        folder = bundle / BLIP2 / MODEL_VERSION
        self._vision, self._qformer = (
            self._stack.enter_context(
                create_engine(manifest.engine, bundle / name / MODEL_VERSION / GRAPH_FILE, threads=threads)
            )
            for name in (VISION_ENCODER, QFORMER)
        )
        self._decoder = load_decoder(
            manifest.decoder, lambda file: create_engine(manifest.engine, folder / file, threads=threads)
        )
        self._stack.callback(self._decoder.close)
        self._tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
        self._soft_tokens: dict[int, tuple[Image.Image, np.ndarray[Any, Any]]] = {}  # by the id of an image held here

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """Greedy texts, all of them in flight together."""
        self._encode(images)
        loop = DecodeLoop(
            self._decoder,
            self._tokenizer,
            eos_token_ids=self._manifest.generation.eos_token_ids,
            config=LoopConfig(max_waiting=len(prompts)),
        )
        chunks: list[list[Chunk]] = [[] for _ in prompts]
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            ids = self._tokenizer.encode(prompt) if prompt else self._manifest.generation.empty_prompt_ids
            whole = Prompt(self._soft_tokens[id(image)][1], tuple(ids))
            params = SamplingParams(max_tokens=NEW_TOKENS)
            loop.submit(GenerationRequest(str(index), whole, params, on_chunk=chunks[index].append))
        loop.close()
        return ["".join(chunk.text for chunk in answer).strip() for answer in chunks]

    def close(self) -> None:
        """Release the engines."""
        self._stack.close()

    def _encode(self, images: Sequence[Image.Image]) -> None:
        new = list({id(image): image for image in images if id(image) not in self._soft_tokens}.values())
        if not new:
            return
        pixel_values = np.stack([self._transform(image) for image in new])
        features = self._qformer.run(self._vision.run({PIXEL_VALUES.name: pixel_values}))[SOFT_TOKENS.name]
        for image, soft_tokens in zip(new, features, strict=True):
            self._soft_tokens[id(image)] = (image, soft_tokens)


@dataclass(frozen=True)
class Accuracy:
    """Shares of what is right, and every text."""

    captions: float
    questions: float
    texts: tuple[str, ...]


def measure(bundle: Path, shown: Sequence[scenes.Scene], images: Sequence[Image.Image]) -> Accuracy:
    """Caption each scene, and ask one question of each kind about it."""
    model = InProcess(bundle)
    texts: list[str] = []

    def generate(batch: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        found = model(batch, prompts)
        texts.extend(found)
        return found

    try:
        figures = evaluation.generation(generate, shown, images)
    finally:
        model.close()
    kinds = figures["questions"].values()
    right = sum(kind["all"] * kind["n"] for kind in kinds) / sum(kind["n"] for kind in kinds)
    return Accuracy(figures["captions"]["right"]["all"], right, tuple(texts))


def main() -> int:
    """Measure every bundle named on the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description="Accuracy on the demo's test scenes.")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--scenes", type=int, default=1000)
    options = parser.parse_args()
    shown = scenes.test_scenes(options.scenes)
    images = [scenes.render(scene) for scene in shown]
    first: Accuracy | None = None
    for bundle in options.bundles:
        found = measure(bundle, shown, images)
        first = first or found
        equal = np.mean([a == b for a, b in zip(found.texts, first.texts, strict=True)])
        print(
            f"{bundle.name}: captions right {found.captions:.2%}, answers right {found.questions:.2%}, texts equal to "
            f"{options.bundles[0].name}'s {equal:.2%}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
