"""A language model's own pre-training: it reads a written scene description, then captions it or answers.

The description stands where the Q-Former's soft tokens will stand, one to three of its words in a slot, with noise,
so that a frozen model can later make sense of vectors that are no word of its own. What differs between the language
models is in :data:`OPT`, :data:`LLAMA` and :data:`T5`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from .text import Text, scene_texts, spelled_out
from .training import Ahead, Recipe, Run

QUERIES = 16
_MAX_NOISE = 0.6  # standard deviation over that of the embeddings
_WITH_POSITIONS = ("opt",)
_EASY = ("colour", "shape", "size", "count")


@dataclass(frozen=True)
class Lesson:
    """A part of a language model's pre-training: the recipe, the first training scene, and what is asked about a scene:
    how many times more questions of the ``hard`` kinds, how many about relations with ``spelled`` out answers, and how
    likely are the easy ones."""

    recipe: Recipe
    first: int = 0
    again: int = 0
    hard: tuple[str, ...] = ("existence", "relation")
    spelled: int = 0
    easy: float = 1.0

    def texts(self, scene: scenes.Scene, rng: np.random.Generator) -> list[Text]:
        texts = scene_texts(scene, 0, rng)
        if self.easy < 1:
            texts = [text for text in texts if text.kind not in _EASY or rng.random() < self.easy]
        for variant in range(1, self.again + 1):
            texts += [text for text in scene_texts(scene, variant, rng) if text.kind in self.hard]
        for variant in range(self.spelled):
            asked = scenes.questions(scene, variant)
            texts += [spelled_out(question) for question in asked if question.kind == "relation"]
        return texts


@dataclass(frozen=True)
class Kind:
    """A kind of language model: its tokenizer, its config, and its pre-training: the lessons, whether an object's words
    share a slot in the part of the slots that belongs to its place (easier to read than words strewn over the slots;
    the Q-Former can learn to write either), and how strongly tokens attend to their like and to their neighbours at
    first, see :func:`attend_by_likeness` and :func:`attend_to_neighbours`."""

    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    build_config: Callable[[PreTrainedTokenizerFast], PretrainedConfig]
    lessons: tuple[Lesson, ...]
    placed: bool = False
    likeness: float = 0.0
    nearness: float = 0.0

    @property
    def recipe(self) -> Recipe:
        """That of the last lesson, which leaves the language model as it is used."""
        return self.lessons[-1].recipe


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


def _t5_factors(biases: float) -> dict[str, float]:
    """T5's scores are not scaled down, and its encoder knows the order of words by biases alone: if queries and keys
    learn as fast as the rest and the biases as slowly, a question remains a bag of words."""
    return {"relative_attention_bias": biases, r"\.[qk]\.weight": 0.4}


def _t5_relations(name: str, steps: int) -> Recipe:
    """Slower than the first lesson, in which relations came only as the rate fell."""
    return Recipe(name, steps=steps, batch=16, muon_lr=0.006, adam_lr=1e-3, factors=_t5_factors(6.0))


OPT = Kind(tokens.build_opt_tokenizer, _opt_config, (Lesson(Recipe("language", steps=1550, batch=48)),))
LLAMA = Kind(
    tokens.build_llama_tokenizer,
    _llama_config,
    (Lesson(Recipe("language_llama", steps=3000, batch=24), again=3),),
    placed=True,
    likeness=5.0,
)
T5 = Kind(
    tokens.build_t5_tokenizer,
    _t5_config,
    (
        Lesson(Recipe("language_t5", steps=2000, batch=16, factors=_t5_factors(10.0)), again=3, spelled=2),
        Lesson(_t5_relations("language_t5_relations", 600), 32_000, 5, ("relation",), spelled=2, easy=0.5),
        Lesson(_t5_relations("language_t5_more", 450), 41_600, 6, ("relation",), spelled=1, easy=0.3),
    ),
    placed=True,
    likeness=5.0,
    nearness=4.0,
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


def attend_to_neighbours(model: PreTrainedModel, score: float) -> None:
    """Start two heads of T5's encoder, of those that :func:`attend_by_likeness` leaves alone, from biases of ``score``
    for the token before, or behind, and half of it for all on that side."""
    biases = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    buckets, heads = biases.shape
    with torch.no_grad():
        for head, nearest, side in (
            (heads // 2, 1, slice(0, buckets // 2)),
            (heads // 2 + 1, buckets // 2 + 1, slice(buckets // 2 + 1, buckets)),
        ):
            biases[nearest, head] += score
            biases[side, head] += score / 2


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


def train(work: Path, kind: Kind, recipes: Mapping[str, Recipe]) -> PreTrainedModel:
    """All lessons, by ``recipes`` of their names."""
    torch.manual_seed(kind.recipe.seed)
    tokenizer = kind.build_tokenizer()
    model = build(kind.build_config(tokenizer))
    if kind.likeness:
        attend_by_likeness(model, kind.likeness)
    if kind.nearness:
        attend_to_neighbours(model, kind.nearness)
    read, describe = reader(model.config, tokenizer), Describer(tokenizer, kind.placed)
    for lesson in kind.lessons:
        _learn(work, model, lesson, recipes[lesson.recipe.name], read, describe)
    return model


def _learn(
    work: Path, model: PreTrainedModel, lesson: Lesson, recipe: Recipe, read: Reader, describe: Describer
) -> None:
    def prepare(step: int) -> tuple[torch.Tensor, object]:
        rng, first = recipe.rng(step), lesson.first + step * recipe.batch
        batch = [scenes.scene("train", first + i) for i in range(recipe.batch)]
        packed = read.pack([lesson.texts(scene, rng) for scene in batch])
        return describe(batch, rng), packed

    batches = Ahead(prepare)

    def loss(step: int, _: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        slots, packed = batches(step)
        found = read.predict(model, description_embeds(model, slots, noisy=True), packed)
        return text_loss(found), {"right": float(found.right().float().mean())}

    Run(work, recipe, model, loss).train()


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
