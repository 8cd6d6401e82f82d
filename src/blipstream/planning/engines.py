"""The engines of a bundle without a server: a function from pixels to tokens, stage by stage."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from blipstream.contract import BLIP2, GRAPH_FILE, IMAGE_EMBEDS, MODEL_VERSION, PIXEL_VALUES, SOFT_TOKENS
from blipstream.contract import QFORMER as QFORMER_MODEL
from blipstream.contract import VISION_ENCODER as VISION_MODEL
from blipstream.decoding.logits import Logits, reduced
from blipstream.decoding.request import Prompt
from blipstream.engines import Engine, load_decoder, open_engine
from blipstream.instructions import instruction_inputs
from blipstream.manifest import Manifest

if TYPE_CHECKING:
    from typing_extensions import Self

INSTRUCTION_TOKENS = 10
"""Of a short question."""

Floats = npt.NDArray[np.float32]


class Bundle:
    """A bundle's engines; a context manager.

    Args:
        folder: of the bundle.
        threads: of each engine; all cores by default.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.manifest = manifest = Manifest.load(folder)

        def load(model: str, graph: str) -> Engine:
            return open_engine(manifest, folder / model / MODEL_VERSION, graph, threads=threads)

        with ExitStack() as stack:
            self._vision = stack.enter_context(load(VISION_MODEL, GRAPH_FILE))
            self._qformer = stack.enter_context(load(QFORMER_MODEL, GRAPH_FILE))
            self.decoder = load_decoder(manifest.decoder, lambda graph: load(BLIP2, graph))
            stack.callback(self.decoder.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def see(self, images: Floats) -> Floats:
        """``image_embeds`` (B, N, D) of pixels (B, 3, S, S)."""
        return self._vision.run({PIXEL_VALUES.name: images})[IMAGE_EMBEDS.name]

    def read(self, embeds: Floats) -> Floats:
        """``soft_tokens`` (B, Q, D_text) of ``image_embeds``, and a short instruction where the Q-Former reads one."""
        inputs = {IMAGE_EMBEDS.name: embeds}
        if self.manifest.qformer.instruction is not None:
            one = instruction_inputs([1] * INSTRUCTION_TOKENS)
            inputs |= {name: np.repeat(ids, len(embeds), axis=0) for name, ids in one.items()}
        return self._qformer.run(inputs)[SOFT_TOKENS.name]

    def prompts(self, soft_tokens: Floats) -> list[Prompt]:
        """What a plain caption begins with."""
        return [Prompt(soft, self.manifest.generation.empty_prompt_ids) for soft in soft_tokens]

    def caption(self, images: Floats, tokens: int) -> list[list[int]]:
        """Token ids of a caption of so many tokens of each image."""
        return self.continued(self.prompts(self.read(self.see(images))), tokens)

    def continued(self, prompts: list[Prompt], tokens: int) -> list[list[int]]:
        """So many token ids behind each prompt, chosen greedily; all prompts are one batch."""
        logits = self.decoder.prefill(0, prompts)
        lengths = self.lengths(prompts)
        chosen = [self._choose(logits)]
        while len(chosen) < tokens:
            chosen.append(self._choose(self.decoder.decode(chosen[-1], lengths)))
            lengths += 1
        rows: list[list[int]] = np.stack(chosen, axis=1).tolist()
        return rows

    def lengths(self, prompts: list[Prompt]) -> npt.NDArray[np.int64]:
        """Tokens in the decoder's cache behind a prefill, of each row; an encoder's are not in it."""
        held = [1 if self.manifest.decoder.encoder else prompt.num_tokens for prompt in prompts]
        return np.array(held, np.int64)

    def _choose(self, logits: Logits) -> npt.NDArray[np.int64]:
        """Greedily, but no end token."""
        end = list(self.manifest.generation.eos_token_ids)
        chosen = reduced(logits)[0].copy()
        for row in np.flatnonzero(np.isin(chosen, end)):
            scores = logits[row].copy()
            scores[end] = -np.inf
            chosen[row] = scores.argmax()
        return chosen
