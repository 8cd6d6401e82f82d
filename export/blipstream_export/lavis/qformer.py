"""What LAVIS trains: Q-Former, query tokens, ``ln_vision`` and the projection into the language model.

A Q-Former of InstructBLIP reads the prompt as well, for which it has layers and embeddings of its own. BLIP-2 trains
without them, and LAVIS has no InstructBLIP with OPT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream_export.lavis.parts import Part

HEAD_DIM = 64
"""Size of a head of the Q-Former, which is a BERT; no tensor tells it."""

PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "opt_proj": ("opt",),
    "t5_proj": ("t5",),
    "llm_proj": ("llama",),
}
"""LAVIS's names of the projection, each with the language models (``model_type``) that it is made for."""

_WITHOUT_INSTRUCTIONS = ("opt_proj",)

_LAYERS = "Qformer.bert.encoder.layer."
_EMBEDDINGS = "Qformer.bert.embeddings."
_WORDS, _POSITIONS = "word_embeddings.weight", "position_embeddings.weight"
_ATTENTION = {
    "self.query": "attention.query",
    "self.key": "attention.key",
    "self.value": "attention.value",
    "output.dense": "output.dense",
    "output.LayerNorm": "output.LayerNorm",
}
"""Layers of an attention, by their names here and in transformers."""


@dataclass(frozen=True)
class Trained:
    """The trained part as read; its tensors have the names of ``Blip2ForConditionalGeneration``, or InstructBLIP's."""

    projection: str
    """LAVIS's name of the projection."""
    config: dict[str, Any]
    """Fields of the Q-Former's configuration."""
    instructed: bool
    """Whether it reads the prompt as well."""
    num_query_tokens: int
    vision_width: int
    """Width of the image features that it reads."""
    text_width: int
    """Width of the language model that it was trained for."""
    tensors: dict[str, Tensor]


def read_trained(part: Part) -> Trained:
    """Read the trained part.

    Raises:
        UnsupportedCheckpointError: it projects into no language model, or into several.
        CheckpointError: tensors are missing or contradict each other.
    """
    projection = _find_projection(part)
    num_queries, width = part.shape("query_tokens", "1, queries, width")[1:]
    if width % HEAD_DIM:
        raise UnsupportedCheckpointError(
            f"{part.origin} has a Q-Former of width {width}, no multiple of {HEAD_DIM}, which is BERT's size of a head "
            "and told by no tensor"
        )
    depth, frequency = _layout(part)
    vision_width = part.shape(f"{_LAYERS}0.crossattention.self.key.weight", "width, width of the image features")[1]
    inner = part.shape(f"{_LAYERS}0.intermediate_query.dense.weight", "inner width, width")[0]
    text_width = part.shape(f"{projection}.weight", "width of the language model, width")[0]
    instructed = projection not in _WITHOUT_INSTRUCTIONS and f"{_EMBEDDINGS}{_WORDS}" in part.names()
    tensors = {"query_tokens": part.take("query_tokens", 1, num_queries, width)}
    texts: dict[str, int] = {}
    if instructed:
        words, texts = _embeddings(part, width)
        tensors |= words
    norm = "qformer.embeddings.layernorm" if instructed else "qformer.layernorm"
    tensors |= _linear(part, f"{_EMBEDDINGS}LayerNorm", norm, width)
    for index in range(depth):
        source, target = f"{_LAYERS}{index}.", f"qformer.encoder.layer.{index}."
        tensors |= _attentions(part, source, target, width, vision_width if index % frequency == 0 else None)
        for suffix in ("_query", "") if instructed else ("_query",):
            tensors |= _feed_forward(part, source, target, suffix, width, inner)
    tensors |= _linear(part, projection, "language_projection", text_width, width)
    tensors |= _linear(part, "ln_vision", "vision_model.post_layernorm", vision_width)
    part.check()
    config = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_DIM,
        "intermediate_size": inner,
        "encoder_hidden_size": vision_width,
        "cross_attention_frequency": frequency,
        **texts,
    }
    return Trained(projection, config, instructed, num_queries, vision_width, text_width, tensors)


def _find_projection(part: Part) -> str:
    names = part.names()
    found = [name for name in PROJECTIONS if f"{name}.weight" in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnsupportedCheckpointError(f"{part.origin} projects into several language models: {', '.join(found)}")
    first_stage = names & {"itm_head.weight", "vision_proj.weight", "text_proj.weight"}
    kind = " (it is of the first stage, which serves image-text retrieval)" if first_stage else ""
    raise UnsupportedCheckpointError(
        f"{part.origin} has no projection into a language model{kind}: expected one of {', '.join(PROJECTIONS)}"
    )


def _layout(part: Part) -> tuple[int, int]:
    """Number of layers, and every how many of them there is a cross-attention, which the first layer has."""
    depth, names = part.count(_LAYERS), part.names()
    crossed = [index for index in range(depth) if f"{_LAYERS}{index}.crossattention.self.key.weight" in names]
    frequency = crossed[1] if len(crossed) > 1 else max(depth, 1)
    if crossed != list(range(0, depth, frequency)):
        raise CheckpointError(
            f"{part.origin} has {depth} Q-Former layers with cross-attention in {crossed}, and it was expected in "
            "every n-th layer from the first on"
        )
    return depth, frequency


def _embeddings(part: Part, width: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Embeddings of an instruction's tokens, and their numbers as fields of the configuration."""
    rows = [part.shape(_EMBEDDINGS + name, "rows, width")[0] for name in (_WORDS, _POSITIONS)]
    tensors = {
        f"qformer.embeddings.{name}": part.take(_EMBEDDINGS + name, count, width)
        for name, count in zip((_WORDS, _POSITIONS), rows, strict=True)
    }
    return tensors, {"vocab_size": rows[0], "max_position_embeddings": rows[1]}


def _attentions(part: Part, source: str, target: str, width: int, crossed: int | None) -> dict[str, Tensor]:
    """The attentions of a layer; ``crossed`` is the width of what its cross-attention reads, if it has one."""
    tensors: dict[str, Tensor] = {}
    attentions = {"attention": width} | ({"crossattention": crossed} if crossed else {})
    for attention, read in attentions.items():
        for own, name in _ATTENTION.items():
            reads = read if own in ("self.key", "self.value") else width
            shape = (width,) if own.endswith("LayerNorm") else (width, reads)
            tensors |= _linear(part, f"{source}{attention}.{own}", f"{target}{attention}.{name}", *shape)
    return tensors


def _feed_forward(part: Part, source: str, target: str, suffix: str, width: int, inner: int) -> dict[str, Tensor]:
    """A feed-forward of a layer: the queries', whose names end in ``_query``, or the instruction's."""
    tensors: dict[str, Tensor] = {}
    for name, shape in (
        (f"intermediate{suffix}.dense", (inner, width)),
        (f"output{suffix}.dense", (width, inner)),
        (f"output{suffix}.LayerNorm", (width,)),
    ):
        tensors |= _linear(part, source + name, target + name, *shape)
    return tensors


def _linear(part: Part, source: str, target: str, *shape: int) -> dict[str, Tensor]:
    """Weight and bias of a linear layer or, with one dimension, of a norm."""
    return {
        f"{target}.weight": part.take(f"{source}.weight", *shape),
        f"{target}.bias": part.take(f"{source}.bias", shape[0]),
    }
