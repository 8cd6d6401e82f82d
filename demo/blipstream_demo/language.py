"""The language model's own pre-training: it reads a written scene description, then captions it or answers.

The description stands where the Q-Former's soft tokens will stand, one to three of its words in a slot, with noise,
so that a frozen model can later make sense of vectors that are no word of its own.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from . import scenes
from .text import Packed, Packer, Text, scene_texts
from .training import Ahead, Recipe, Run

QUERIES = 16
RECIPE = Recipe("language", steps=1550, batch=48)
_MAX_NOISE = 0.6  # standard deviation over that of the embeddings


def config(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        word_embed_proj_dim=192,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=256,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def packed_logits(model: OPTForCausalLM, prefix: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Logits (B, L, V) of packed texts behind soft tokens ``prefix`` (B, Q, D)."""
    embeds = torch.cat([prefix, model.get_input_embeddings()(packed.ids)], 1)
    hidden = model.model.decoder(
        inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, prefix.shape[1] :])


def text_loss(model: OPTForCausalLM, prefix: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Cross-entropy of the tokens that are predicted."""
    known = packed.labels != -100
    return F.cross_entropy(packed_logits(model, prefix, packed)[known], packed.labels[known])


class Describer:
    """Writes scenes into prefix slots: ids (B, QUERIES, 3) of the words in each slot, -1 for none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        words = (*scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES)
        self._ids = {word: tokenizer(" " + word).input_ids[1] for word in words}
        if len(set(self._ids.values())) != len(words):
            raise ValueError("the tokenizer splits words of the world; enlarge its vocabulary")

    def __call__(self, batch: list[scenes.Scene], rng: np.random.Generator, plain: bool = False) -> torch.Tensor:
        slots = np.full((len(batch), QUERIES, 3), -1, np.int64)
        for row, scene in enumerate(batch):
            groups: list[list[int]] = []
            together, shuffled = (False, False) if plain else (rng.random() < 0.3, rng.random() < 0.3)
            for triple in scene.triples:
                words = [self._ids[word] for word in triple]
                if shuffled:
                    rng.shuffle(words)
                groups += [words] if together else [[word] for word in words]
            places = range(len(groups)) if plain else np.sort(rng.choice(QUERIES, len(groups), replace=False))
            for place, words in zip(places, groups, strict=True):
                slots[row, place, : len(words)] = words
        return torch.from_numpy(slots)


def description_embeds(model: OPTForCausalLM, slots: torch.Tensor, noisy: bool) -> torch.Tensor:
    """Soft tokens (B, QUERIES, D): the sum of each slot's words, plus noise of a level of its own."""
    table = model.get_input_embeddings()
    embeds = (table(slots.clamp(min=0)) * (slots >= 0).unsqueeze(-1)).sum(2)
    if not noisy:
        return embeds
    spread = table.weight.detach().std() * _MAX_NOISE
    return embeds + torch.randn_like(embeds) * spread * torch.rand(len(slots), 1, 1)


def train(work: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe = RECIPE) -> OPTForCausalLM:
    torch.manual_seed(recipe.seed)
    model = OPTForCausalLM(config(tokenizer))
    packer, describe = Packer(tokenizer, QUERIES), Describer(tokenizer)

    def prepare(step: int) -> tuple[torch.Tensor, Packed]:
        rng = recipe.rng(step)
        batch = [scenes.scene("train", step * recipe.batch + i) for i in range(recipe.batch)]
        packed = packer.pack([scene_texts(scene, 0, rng) for scene in batch])
        return describe(batch, rng), packed

    batches = Ahead(prepare)

    def loss(step: int, _: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        slots, packed = batches(step)
        return text_loss(model, description_embeds(model, slots, noisy=True), packed), {}

    Run(work, recipe, model, loss).train()
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, count: int = 500) -> dict[str, float]:
    """Share of validation texts, by kind, whose every token is the likeliest one, from a plain description."""
    packer, describe, rng = Packer(tokenizer, QUERIES), Describer(tokenizer), np.random.default_rng(0)
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, count, 50):
        batch = [scenes.scene("val", first + i) for i in range(50)]
        texts = [scene_texts(scene, 0, rng) for scene in batch]
        prefix = description_embeds(model, describe(batch, rng, plain=True), noisy=False)
        score(model, packer, texts, prefix, right)
    return {kind: float(np.mean(values)) for kind, values in sorted(right.items())}


def score(
    model: OPTForCausalLM, packer: Packer, texts: list[list[Text]], prefix: torch.Tensor, right: dict[str, list[bool]]
) -> None:
    """Add to ``right``, by kind, whether every predicted token of each text is the likeliest one."""
    packed = packer.pack(texts)
    found = packed_logits(model, prefix, packed).argmax(-1)
    match = ((found == packed.labels) | (packed.labels == -100)).numpy()
    for row, row_texts in enumerate(texts):
        start = 0
        for text in row_texts:
            stop = start + len(packer.encode(text.whole))
            right[text.kind].append(bool(match[row, start:stop].all()))
            start = stop
