"""The Q-Former's second stage: it and a linear projection learn to speak to a frozen language model.

The loss is the paper's, the language model's own on captions and answers; an image comes with several texts. In
InstructBLIP the Q-Former reads the prompt as well, so that each text has soft tokens of its own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    BertTokenizerFast,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from . import language, qformer, scenes
from .language import score, text_loss
from .reading import Predictions
from .text import Text, scene_texts
from .training import Ahead, Recipe, Run

OPT = Recipe("stage_two", steps=900, batch=64, muon_lr=0.01, adam_lr=1e-3, warmup=0.04)
T5 = Recipe("stage_two_t5", steps=1050, batch=32, muon_lr=0.01, adam_lr=1e-3, warmup=0.04)
INSTRUCT = Recipe("stage_two_instruct", steps=900, batch=32, muon_lr=0.01, adam_lr=1e-3, warmup=0.04)
_TEXTS = 5  # of an image in a step


class StageTwo(nn.Module, ABC):
    """A generation model with everything frozen but Q-Former, query tokens and projection."""

    def __init__(
        self,
        model: Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.read = language.reader(model.language_model.config, tokenizer)
        model.vision_model.requires_grad_(False)
        model.language_model.requires_grad_(False)

    def start_from(self, stage_one: Blip2ForImageTextRetrieval, layers: Sequence[int]) -> None:
        """Take over these ``layers`` of the Q-Former and the query tokens, and draw a projection whose soft tokens are
        about as large as the language model's word embeddings. What has no place here is left out: the text side in
        BLIP-2, cross-attention in layers that have none."""
        taken = self.model.qformer.load_state_dict(self._taken(stage_one, layers), strict=False)
        if taken.missing_keys:
            raise ValueError(f"the first stage's Q-Former has no {', '.join(taken.missing_keys)}")
        with torch.no_grad():
            self.model.query_tokens.copy_(stage_one.query_tokens)
            projection = self.model.language_projection
            spread = float(self.model.language_model.get_input_embeddings().weight.std())
            nn.init.normal_(projection.weight, std=spread * projection.in_features**-0.5)
            nn.init.zeros_(projection.bias)

    def _taken(self, stage_one: Blip2ForImageTextRetrieval, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        return _some_layers(stage_one.qformer.state_dict(), layers)

    @abstractmethod
    def pack(self, rows: list[list[Text]]) -> Any:
        """Texts, a row of them for each image, as a batch for :meth:`predict`."""

    @abstractmethod
    def predict(self, image: torch.Tensor, batch: Any) -> Predictions:
        """What the model makes of the texts behind the soft tokens of image features (B, P, D)."""


def _some_layers(state: dict[str, torch.Tensor], layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The state of a Q-Former of only these ``layers``."""
    taken = {}
    for name, value in state.items():
        layer = re.match(r"encoder\.layer\.(\d+)\.", name)
        if not layer:
            taken[name] = value
        elif int(layer[1]) in layers:
            taken[f"encoder.layer.{layers.index(int(layer[1]))}.{name[layer.end() :]}"] = value
    return taken


class Blip2StageTwo(StageTwo):
    """The Q-Former reads the image alone."""

    def soft_tokens(self, image: torch.Tensor) -> torch.Tensor:
        """Image features (B, P, D) -> soft tokens (B, Q, E) of the language model."""
        keys_values = qformer.image_keys_values(self.model.qformer, image)
        query = self.model.query_tokens.expand(len(image), -1, -1)
        hidden = qformer.forward(self.model.qformer, query, query.shape[1], None, keys_values)
        return self.model.language_projection(hidden)

    def pack(self, rows: list[list[Text]]) -> Any:
        return self.read.pack(rows)

    def predict(self, image: torch.Tensor, batch: Any) -> Predictions:
        return self.read.predict(self.model.language_model, self.soft_tokens(image), batch)


@dataclass(frozen=True)
class Instructed:
    """Texts with soft tokens of their own: the image (N,) of each, its prompt as the Q-Former reads it (ids (N, S) and
    where there are any (N, S)), and the language model's batch of N rows."""

    images: torch.Tensor
    ids: torch.Tensor
    present: torch.Tensor
    texts: Any


class InstructStageTwo(StageTwo):
    """The Q-Former reads the image and the prompt."""

    model: InstructBlipForConditionalGeneration

    def __init__(
        self,
        model: InstructBlipForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        wordpiece: BertTokenizerFast,
    ) -> None:
        super().__init__(model, tokenizer)
        self.wordpiece = wordpiece

    def _taken(self, stage_one: Blip2ForImageTextRetrieval, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """The text side is wanted here, and the layer norm belongs to the embeddings."""
        taken = super()._taken(stage_one, layers)
        taken |= {f"embeddings.{name}": value for name, value in stage_one.embeddings.state_dict().items()}
        return {f"embeddings.{name}" if name.startswith("layernorm.") else name: taken[name] for name in taken}

    def soft_tokens(
        self, image: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Image features (B, P, D), and the image (N,) and prompt (N, S) of each text -> soft tokens (N, Q, E)."""
        keys_values = qformer.select(qformer.image_keys_values(self.model.qformer, image), rows)
        query = self.model.query_tokens.expand(len(ids), -1, -1)
        hidden = self.model.qformer.embeddings(input_ids=ids, query_embeds=query)
        queries = query.shape[1]
        mask = nn.functional.pad(present, (queries, 0), value=True)[:, None, None, :]
        hidden = qformer.encode(self.model.qformer, hidden, queries, mask, keys_values)
        return self.model.language_projection(hidden[:, :queries])

    def pack(self, rows: list[list[Text]]) -> Instructed:
        images = torch.tensor([row for row, texts in enumerate(rows) for _ in texts])
        flat = [text for texts in rows for text in texts]
        prompts = self.wordpiece([text.prompt for text in flat], padding=True, return_tensors="pt")
        texts = self.read.pack([[text] for text in flat])
        return Instructed(images, prompts.input_ids, prompts.attention_mask.bool(), texts)

    def predict(self, image: torch.Tensor, batch: Instructed) -> Predictions:
        soft = self.soft_tokens(image, batch.images, batch.ids, batch.present)
        return self.read.predict(self.model.language_model, soft, batch.texts)


def draw_texts(scene: scenes.Scene, variant: int, rng: np.random.Generator) -> list[Text]:
    """The caption and some of the questions."""
    caption, *asked = scene_texts(scene, variant, rng)
    chosen = rng.permutation(len(asked))[: _TEXTS - 1]
    return [caption, *(asked[i] for i in chosen)]


def train(work: Path, stage: StageTwo, features: np.ndarray, recipe: Recipe) -> StageTwo:
    """Train ``stage`` on cached features (N, P, D) of the first N training scenes."""

    def prepare(step: int) -> tuple[torch.Tensor, Any]:
        rng = recipe.rng(step)
        rows = np.sort(rng.choice(len(features), recipe.batch, replace=False))
        texts = [draw_texts(scenes.scene("train", int(row)), step % 50, rng) for row in rows]
        return torch.from_numpy(features[rows]).float(), stage.pack(texts)

    batches = Ahead(prepare)

    def loss(step: int, _: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        found = stage.predict(*batches(step))
        return text_loss(found), {"right": float(found.right().float().mean())}

    Run(work, recipe, stage, loss).train()
    return stage


@torch.inference_mode()
def accuracy(stage: StageTwo, features: np.ndarray, split: str = "val") -> dict[str, float]:
    """Share of texts, by kind, whose every token is the likeliest one; features (N, P, D) are of the split's first."""
    rng = np.random.default_rng(0)
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(features), 50):
        part = torch.from_numpy(features[first : first + 50].astype(np.float32))
        texts = [scene_texts(scenes.scene(split, first + i), 0, rng) for i in range(len(part))]
        score(stage.predict(part, stage.pack(texts)), texts, right)
    return {kind: float(np.mean(values)) for kind, values in sorted(right.items())}
