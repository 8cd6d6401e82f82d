"""Small language models of every variant, prompts for them, and what transformers computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blipstream_export.families import LANGUAGE_MODELS
from blipstream_export.graphs import export_graph
from torch import Tensor

from blipstream.decoding.request import Prompt
from blipstream.engines import RowDecoder, create_engine, load_decoder
from blipstream.manifest import DecoderSection
from tests.support.checkpoints import make_blip2
from tests.support.languages import LLAMA_VARIANTS, OPT_VARIANTS, T5_VARIANTS

VARIANTS = {"opt": OPT_VARIANTS, "llama": LLAMA_VARIANTS, "t5": T5_VARIANTS}
CASES = [(language, name) for language, variants in VARIANTS.items() for name in variants]
VOCAB_SIZE = {"opt": 320, "llama": 340, "t5": 62}
CAPACITY = 24


def make_model(language: str, text: dict[str, Any] | None = None) -> Any:
    size = VOCAB_SIZE[language]
    return make_blip2(language, size, size - 1, seed=5, text=text).language_model


def module_of(language: str) -> Any:
    (line,) = [line for line in LANGUAGE_MODELS if line.model_type == language]
    return line.load()


@dataclass(frozen=True)
class Exported:
    """A language model in transformers, and its graphs for ONNX Runtime; three rows."""

    model: Any
    sizes: DecoderSection
    folder: Path

    @classmethod
    def export(cls, language: str, model: Any, folder: Path) -> Exported:
        module = module_of(language)
        sizes = module.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
        with torch.no_grad():
            for graph in module.graphs(model, sizes):
                export_graph(graph.module, graph.inputs, folder / graph.file, engine="onnxruntime")
        return cls(model, sizes, folder)

    def load(self, prefix_bytes: int = 0) -> RowDecoder:
        return load_decoder(
            self.sizes, lambda file: create_engine("onnxruntime", self.folder / file, threads=1), prefix_bytes
        )


Exporter = Callable[[str, str], Exported]
"""Gives a variant of a language model, exported once."""


def make_prompts(model: Any, lengths: Sequence[tuple[int, int]], seed: int = 1) -> list[Prompt]:
    """Prompts of so many soft tokens and so many tokens of text."""
    rng = np.random.default_rng(seed)
    width, size = model.get_input_embeddings().weight.shape[1], model.config.vocab_size
    return [
        Prompt(rng.standard_normal((soft, width)).astype(np.float32), tuple(rng.integers(0, size - 1, text).tolist()))
        for soft, text in lengths
    ]


def expected_logits(model: Any, prompt: Prompt, generated: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits (V,) behind a prompt and generated tokens: the whole sequence in transformers, without a cache."""
    words = model.get_input_embeddings()(torch.tensor(prompt.token_ids))
    embeds = torch.cat([torch.from_numpy(prompt.soft_tokens), words])
    if model.config.is_encoder_decoder:
        ids = torch.tensor([[model.config.decoder_start_token_id, *generated]])
        return model(inputs_embeds=embeds[None], decoder_input_ids=ids, use_cache=False).logits[0, -1].numpy()
    if generated:
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(generated))])
    return model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].numpy()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def decode_along(decoder: RowDecoder, model: Any, tolerance: float = 5e-5) -> None:
    """Rows of unequal lengths, prefilled at different times, then stepped together, against transformers.

    Args:
        decoder: of three rows.
        model: the language model in transformers.
        tolerance: of the logits, relative to their largest.
    """
    start = 1 if model.config.is_encoder_decoder else None
    prompts = make_prompts(model, [(4, 5), (2, 1), (1, 12)])
    generated: list[list[int]] = [[], [], []]

    def check(found: npt.NDArray[np.float32], first: int) -> None:
        for row, logits in enumerate(found, first):
            expected = expected_logits(model, prompts[row], generated[row])
            np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())
            generated[row].append(int(expected.argmax()))

    check(decoder.prefill(0, prompts[:1]), 0)
    for step in range(7):
        if step == 2:
            check(decoder.prefill(1, prompts[1:]), 1)
        running = [row for row in range(3) if generated[row]]
        lengths = [(start or prompts[row].num_tokens) + len(generated[row]) - 1 for row in running]
        check(decoder.decode(np.array([generated[row][-1] for row in running]), np.array(lengths)), 0)
