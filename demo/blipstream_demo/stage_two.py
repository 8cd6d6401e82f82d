"""The Q-Former's second stage: it and a linear projection learn to speak to the frozen language model.

The loss is the paper's, the language model's own on captions and answers; several texts of an image share one row.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, PreTrainedTokenizerFast

from . import qformer, scenes
from .language import score, text_loss
from .text import Packed, Packer, Text, scene_texts
from .training import Ahead, Recipe, Run

RECIPE = Recipe("stage_two", steps=900, batch=64, muon_lr=0.01, adam_lr=1e-3, warmup=0.04)
_TEXTS = 5  # of an image in a step


class StageTwo(nn.Module):
    """The generation model with everything frozen but Q-Former, query tokens and projection."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        model.vision_model.requires_grad_(False)
        model.language_model.requires_grad_(False)

    def start_from(self, stage_one: Blip2ForImageTextRetrieval) -> None:
        """Take over the Q-Former and the query tokens (the text side of the first stage has no place here), and draw a
        projection whose soft tokens are about as large as the language model's word embeddings."""
        self.model.qformer.load_state_dict(stage_one.qformer.state_dict(), strict=False)
        with torch.no_grad():
            self.model.query_tokens.copy_(stage_one.query_tokens)
            projection = self.model.language_projection
            spread = float(self.model.language_model.get_input_embeddings().weight.std())
            nn.init.normal_(projection.weight, std=spread * projection.in_features**-0.5)
            nn.init.zeros_(projection.bias)

    def soft_tokens(self, image: torch.Tensor) -> torch.Tensor:
        """Image features (B, P, D) -> soft tokens (B, Q, E) of the language model."""
        keys_values = qformer.image_keys_values(self.model.qformer, image)
        query = self.model.query_tokens.expand(len(image), -1, -1)
        hidden = qformer.forward(self.model.qformer, query, query.shape[1], None, keys_values)
        return self.model.language_projection(hidden)


def draw_texts(scene: scenes.Scene, variant: int, rng: np.random.Generator) -> list[Text]:
    """The caption and some of the questions."""
    caption, *asked = scene_texts(scene, variant, rng)
    chosen = rng.permutation(len(asked))[: _TEXTS - 1]
    return [caption, *(asked[i] for i in chosen)]


def train(
    work: Path,
    stage: StageTwo,
    features: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe = RECIPE,
) -> StageTwo:
    """Train ``stage`` on cached features (N, P, D) of the first N training scenes."""
    packer = Packer(tokenizer, stage.model.config.num_query_tokens)

    def prepare(step: int) -> tuple[torch.Tensor, Packed]:
        rng = recipe.rng(step)
        rows = np.sort(rng.choice(len(features), recipe.batch, replace=False))
        texts = [draw_texts(scenes.scene("train", int(row)), step % 50, rng) for row in rows]
        return torch.from_numpy(features[rows]).float(), packer.pack(texts)

    batches = Ahead(prepare)

    def loss(step: int, _: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        image, packed = batches(step)
        return text_loss(stage.model.language_model, stage.soft_tokens(image), packed), {}

    Run(work, recipe, stage, loss).train()
    return stage


@torch.inference_mode()
def accuracy(
    stage: StageTwo, features: np.ndarray, tokenizer: PreTrainedTokenizerFast, split: str = "val"
) -> dict[str, float]:
    """Share of texts, by kind, whose every token is the likeliest one; features (N, P, D) are of the split's first."""
    packer, rng = Packer(tokenizer, stage.model.config.num_query_tokens), np.random.default_rng(0)
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(features), 50):
        texts = [scene_texts(scenes.scene(split, first + i), 0, rng) for i in range(len(features[first : first + 50]))]
        prefix = stage.soft_tokens(torch.from_numpy(features[first : first + 50].astype(np.float32)))
        score(stage.model.language_model, packer, texts, prefix, right)
    return {kind: float(np.mean(values)) for kind, values in sorted(right.items())}
