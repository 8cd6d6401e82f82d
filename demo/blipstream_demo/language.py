"""A language model's own pre-training: it reads a written scene description, then captions it or answers.

The description stands where the Q-Former's soft tokens will stand, one to three of its words in a slot, with noise,
so that a frozen model can later make sense of vectors that are no word of its own. What differs between the language
models is in :data:`OPT`, :data:`LLAMA` and :data:`T5`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5Attention

from . import scenes, tokens
from .reading import PackedReader, PairReader, Predictions, Reader
from .text import Text, scene_texts
from .training import Ahead, Recipe, Run

QUERIES = 16
_MAX_NOISE = 0.6  # standard deviation over that of the embeddings
_WITH_POSITIONS = ("opt",)
_HARD = ("existence", "relation")


@dataclass(frozen=True)
class Kind:
    """A kind of language model: its tokenizer, its config, and its pre-training: the recipe, whether an object's words
    share a slot in the part of the slots that belongs to its place (easier to read than words strewn over the slots;
    the Q-Former can learn to write either), how strongly tokens attend to their like at first, see
    :func:`attend_by_likeness`, and how many times more the hard questions are asked about a scene."""

    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    build_config: Callable[[PreTrainedTokenizerFast], PretrainedConfig]
    recipe: Recipe
    placed: bool = False
    likeness: float = 0.0
    again: int = 0


def _opt_config(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
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


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two query heads to a key and value head."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _t5_config(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """T5 has no begin token: the config names the end token, all that the tokenizer makes of an empty prompt, because
    ``generate`` without a prompt puts the begin token behind the soft tokens."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


OPT = Kind(tokens.build_opt_tokenizer, _opt_config, Recipe("language", steps=1550, batch=48))
LLAMA = Kind(
    tokens.build_llama_tokenizer,
    _llama_config,
    Recipe("language_llama", steps=3000, batch=24),
    placed=True,
    likeness=5.0,
    again=3,
)
T5 = Kind(
    tokens.build_t5_tokenizer,
    _t5_config,
    Recipe("language_t5", steps=1020, batch=16, muon_lr=0.01),
    placed=True,
    likeness=5.0,
    again=3,
)


def build(config: PretrainedConfig) -> PreTrainedModel:
    """The language model of a config, with random weights."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config)


def attend_by_likeness(model: PreTrainedModel, score: float) -> None:
    """Start T5's encoder or LLaMA from queries that are nearly the keys, so that a token's score for its like is about
    ``score``: a word of the question finds the same word in the description, which otherwise takes most of the training
    to come about (compare :func:`vision.initialise`)."""
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            query, key, factor = module.q_proj.weight, module.k_proj.weight, module.head_dim**-0.5
        elif isinstance(module, T5Attention) and not module.is_decoder:
            query, key, factor = module.q.weight, module.k.weight, 1.0
        else:
            continue
        width, count = key.shape[1], int(module.head_dim if hasattr(module, "head_dim") else module.key_value_proj_dim)
        few = len(key) // 2  # half of the heads: the others are to look for places
        with torch.no_grad():
            alike = torch.randn(few, width) * (score / (factor * count * width)) ** 0.5
            key[:few] = alike
            asking = alike.view(-1, count, width).repeat_interleave(len(query) // len(key), 0).flatten(0, 1)
            query[: len(asking)] = asking + 0.3 * asking.std() * torch.randn_like(asking)


def reader(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Reader:
    """How the language model of ``config`` reads soft tokens and texts."""
    if config.is_encoder_decoder:
        return PairReader(tokenizer, config.decoder_start_token_id)
    return PackedReader(tokenizer, QUERIES)


def text_loss(found: Predictions) -> torch.Tensor:
    """Cross-entropy of the tokens that are predicted."""
    return F.cross_entropy(found.logits, found.labels)


class Describer:
    """Writes scenes into prefix slots: ids (B, QUERIES, 3) of the words in each slot, -1 for none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, placed: bool) -> None:
        self._placed = placed
        words = (*scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES)
        pieces = {word: tokenizer(" " + word, add_special_tokens=False).input_ids for word in words}
        if any(len(ids) > 1 for ids in pieces.values()):
            raise ValueError("the tokenizer splits words of the world; enlarge its vocabulary")
        self._ids = {word: ids[0] for word, ids in pieces.items()}

    def __call__(self, batch: list[scenes.Scene], rng: np.random.Generator, plain: bool = False) -> torch.Tensor:
        slots = np.full((len(batch), QUERIES, 3), -1, np.int64)
        for row, scene in enumerate(batch):
            triples = [[self._ids[word] for word in triple] for triple in scene.triples]
            places, groups = (self._in_place if self._placed else self._strewn)(triples, rng, plain)
            for place, words in zip(places, groups, strict=True):
                slots[row, place, : len(words)] = words
        return torch.from_numpy(slots)

    def _in_place(
        self, triples: list[list[int]], rng: np.random.Generator, plain: bool
    ) -> tuple[Sequence[int], list[list[int]]]:
        """One slot for each object: of the first third for the leftmost, and so on."""
        third = QUERIES // 3
        return [third * i + (0 if plain else int(rng.integers(third))) for i in range(len(triples))], triples

    def _strewn(
        self, triples: list[list[int]], rng: np.random.Generator, plain: bool
    ) -> tuple[Sequence[int], list[list[int]]]:
        """A slot for each word, now and then for each object, in order, with gaps."""
        groups: list[list[int]] = []
        together, shuffled = (False, False) if plain else (rng.random() < 0.3, rng.random() < 0.3)
        for words in triples:
            if shuffled:
                rng.shuffle(words)
            groups += [words] if together else [[word] for word in words]
        if plain:
            return range(len(groups)), groups
        return np.sort(rng.choice(QUERIES, len(groups), replace=False)).tolist(), groups


def description_embeds(model: PreTrainedModel, slots: torch.Tensor, noisy: bool) -> torch.Tensor:
    """Soft tokens (B, QUERIES, D): the sum of each slot's words, plus noise of a level of its own.

    For a model without position embeddings, waves say which slot it is: with RMSNorm, and nothing but noise in a slot,
    an empty one would look as loud as a word.
    """
    table = model.get_input_embeddings()
    spread = float(table.weight.detach().std())
    embeds = (table(slots.clamp(min=0)) * (slots >= 0).unsqueeze(-1)).sum(2)
    if model.config.model_type not in _WITH_POSITIONS:
        embeds = embeds + _waves(embeds.shape[-1]) * spread
    if not noisy:
        return embeds
    return embeds + torch.randn_like(embeds) * spread * _MAX_NOISE * torch.rand(len(slots), 1, 1)


def _waves(width: int) -> torch.Tensor:
    """(QUERIES, width): sines and cosines of the slot's place, of unit variance."""
    angles = torch.arange(QUERIES)[:, None] * torch.logspace(0, -1.5, width // 2) * math.pi / 2
    return torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5


def train(work: Path, kind: Kind, recipe: Recipe) -> PreTrainedModel:
    torch.manual_seed(recipe.seed)
    tokenizer = kind.build_tokenizer()
    model = build(kind.build_config(tokenizer))
    if kind.likeness:
        attend_by_likeness(model, kind.likeness)
    read, describe = reader(model.config, tokenizer), Describer(tokenizer, kind.placed)

    def prepare(step: int) -> tuple[torch.Tensor, object]:
        rng = recipe.rng(step)
        batch = [scenes.scene("train", step * recipe.batch + i) for i in range(recipe.batch)]
        packed = read.pack([_texts(scene, kind.again, rng) for scene in batch])
        return describe(batch, rng), packed

    batches = Ahead(prepare)

    def loss(step: int, _: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        slots, packed = batches(step)
        found = read.predict(model, description_embeds(model, slots, noisy=True), packed)
        return text_loss(found), {"right": float(found.right().float().mean())}

    Run(work, recipe, model, loss).train()
    return model


def _texts(scene: scenes.Scene, again: int, rng: np.random.Generator) -> list[Text]:
    """The texts of a scene, and ``again`` times others of the hard kinds, which are learnt last."""
    more = [text for variant in range(1, again + 1) for text in scene_texts(scene, variant, rng) if text.kind in _HARD]
    return scene_texts(scene, 0, rng) + more


@torch.inference_mode()
def accuracy(model: PreTrainedModel, kind: Kind, count: int = 500) -> dict[str, float]:
    """Share of validation texts, by kind, whose every token is the likeliest one, from a plain description."""
    tokenizer, rng = kind.build_tokenizer(), np.random.default_rng(0)
    read, describe = reader(model.config, tokenizer), Describer(tokenizer, kind.placed)
    right: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, count, 50):
        batch = [scenes.scene("val", first + i) for i in range(50)]
        texts = [scene_texts(scene, 0, rng) for scene in batch]
        prefix = description_embeds(model, describe(batch, rng, plain=True), noisy=False)
        score(read.predict(model, prefix, read.pack(texts)), texts, right)
    return {kind: float(np.mean(values)) for kind, values in sorted(right.items())}


def score(found: Predictions, rows: list[list[Text]], right: dict[str, list[bool]]) -> None:
    """Add to ``right``, by kind, whether every predicted token of each text is the likeliest one."""
    texts = [text for row in rows for text in row]
    for text, is_right in zip(texts, found.right().tolist(), strict=True):
        right[text.kind].append(is_right)
