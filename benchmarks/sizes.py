"""What a model weighs and what a step of it costs, by arithmetic on its configuration: values, bytes, operations.

A multiplication and the addition behind it are two operations. Only matrix products are counted; what they leave out
(norms, softmax, activations) is below a hundredth of them at the published sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from blipstream_export.needs import STAGE_PREFIXES
from torch import nn

DECODER, QFORMER, VISION = "decoder", "qformer", "vision_encoder"
STAGES = (VISION, QFORMER, DECODER)
_WIDE = ".wo.weight"

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
"""Of one value of a matrix that is multiplied, by precision."""


@dataclass(frozen=True)
class StageWeights:
    """Weights of one stage, in values.

    Attributes:
        multiplied: in the matrices of linear layers, which every precision stores in its own width.
        other: in tables, norms, biases and convolutions, which are fp16 where the precision is narrower.
        wide: in matrices that overflow fp16, and are fp32 in half precision (``wo`` of T5).
    """

    multiplied: int
    other: int
    wide: int = 0

    @property
    def values(self) -> int:
        """All of them."""
        return self.multiplied + self.other + self.wide

    def stored(self, precision: str) -> int:
        """Bytes of them in a bundle for a GPU."""
        width = BYTES[precision]
        return self.multiplied * width + self.other * max(2, width) + self.wide * (4 if width == 2 else width)


@dataclass(frozen=True)
class ModelSizes:
    """What the roofline and the memory budget need to know of a model.

    Attributes:
        stages: weights of each stage.
        step_weights: values that one decode step reads, whatever its batch.
        cache_values: keys and values that one token adds to the cache of its row.
        cross_values: the same of one token that an encoder has read; 0 without an encoder.
        vision_flops: operations of the ViT for one image.
        qformer_flops: operations of the Q-Former and the projection for one image.
        image_tokens: what the ViT makes of one image.
        vision_width: of each of them.
        query_tokens: soft tokens of one image.
        vocab_size: width of the logits.
    """

    stages: Mapping[str, StageWeights]
    step_weights: int
    cache_values: int
    cross_values: int
    vision_flops: int
    qformer_flops: int
    image_tokens: int
    vision_width: int
    query_tokens: int
    vocab_size: int

    def step_bytes(self, rows: int, length: int, itemsize: int, prompt: int = 0) -> int:
        """Bytes that a decode step must read at least: the weights once, and the cache of every row.

        Args:
            rows: sequences in the step.
            length: tokens in the cache of each.
            itemsize: bytes of a weight and of a cached value.
            prompt: tokens that an encoder has read for each row.
        """
        return itemsize * (self.step_weights + rows * (length * self.cache_values + prompt * self.cross_values))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        stages = {name: [stage.multiplied, stage.other, stage.wide] for name, stage in self.stages.items()}
        return {**self.__dict__, "stages": stages}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSizes:
        """The reverse of :meth:`to_json`."""
        return cls(**{**data, "stages": {name: StageWeights(*stage) for name, stage in data["stages"].items()}})


def model_sizes(model: Any) -> ModelSizes:
    """Sizes of a BLIP-2 or InstructBLIP of transformers, whose weights may be on the meta device."""
    config = model.config
    vision, text = config.vision_config, config.text_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    cache, cross = _cache_values(text)
    return ModelSizes(
        stages=stage_weights(model),
        step_weights=step_weights(model.language_model),
        cache_values=cache,
        cross_values=cross,
        vision_flops=vision_flops(vision),
        qformer_flops=qformer_flops(config.qformer_config, tokens, config.num_query_tokens, text.hidden_size),
        image_tokens=tokens,
        vision_width=vision.hidden_size,
        query_tokens=config.num_query_tokens,
        vocab_size=text.vocab_size,
    )


def stage_weights(model: nn.Module) -> dict[str, StageWeights]:
    """Weights of each stage; a tensor that modules share counts once, and as multiplied if one multiplies it."""
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    counts = {stage: [0, 0, 0] for stage in STAGES}
    for name, parameter in model.named_parameters():
        stage = next((stage for prefix, stage in STAGE_PREFIXES.items() if name.startswith(prefix)), QFORMER)
        kind = 2 if name.endswith(_WIDE) else 0 if id(parameter) in multiplied else 1
        counts[stage][kind] += parameter.numel()
    return {stage: StageWeights(*count) for stage, count in counts.items()}


def step_weights(language_model: nn.Module) -> int:
    """Values that a decode step reads: all but an encoder's, and but tables of which it looks up single rows."""
    multiplied = {id(module.weight) for module in language_model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in language_model.modules() if isinstance(module, nn.Embedding)}
    return _count(
        parameter
        for name, parameter in language_model.named_parameters()
        if not name.startswith("encoder.") and (id(parameter) in multiplied or id(parameter) not in tables)
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _cache_values(text: Any) -> tuple[int, int]:
    """Keys and values of a token over all layers: of the decoder's own, and of one that an encoder has read."""
    if text.is_encoder_decoder:
        values = 2 * text.num_decoder_layers * text.num_heads * text.d_kv
        return values, values
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * (text.hidden_size // text.num_attention_heads), 0


def vision_flops(vision: Any) -> int:
    """Operations of the ViT for one image of N tokens: patches, projections, scores and their sums, feed-forward."""
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens, width, inner = patches + 1, vision.hidden_size, vision.intermediate_size
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return embedding + vision.num_hidden_layers * layer


def qformer_flops(qformer: Any, image_tokens: int, queries: int, text_width: int) -> int:
    """Operations of the Q-Former for one image, without an instruction, and of the projection behind it."""
    width, inner = qformer.hidden_size, qformer.intermediate_size
    crossing = len(range(0, qformer.num_hidden_layers, qformer.cross_attention_frequency))
    layer = 2 * queries * (4 * width**2 + 2 * width * inner) + 4 * queries**2 * width
    cross = 2 * queries * 2 * width**2 + 2 * image_tokens * 2 * qformer.encoder_hidden_size * width
    cross += 4 * queries * image_tokens * width
    return qformer.num_hidden_layers * layer + crossing * cross + 2 * queries * width * text_width
