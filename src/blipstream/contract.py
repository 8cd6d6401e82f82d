"""Every tensor that crosses a boundary, and the layout of a bundle, declared once.

A *bundle* is the output of ``blipstream build``: a Triton model repository with a ``manifest.json`` beside the models.
The exporter writes graphs with the names declared here, the Triton models read and write them, clients send them, and
tests compare every ``config.pbtxt`` with them. Dimensions are integers, or names that a manifest resolves
(:meth:`blipstream.manifest.Manifest.dims`); the leading batch dimension is never listed; ``-1`` is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# --- Triton models -----------------------------------------------------------------------------------------------

PREPROCESS = "preprocess"
VISION_ENCODER = "vision_encoder"
QFORMER = "qformer"
IMAGE_FEATURES = "image_features"
BLIP2 = "blip2"
BLIP2_UNARY = "blip2_unary"

QUESTION_TEMPLATE = "Question: {} Answer:"
"""How BLIP-2 was shown questions (Li et al. 2023, section 4.2)."""

QUESTION_TEMPLATE_PARAMETER = "question_template"
"""Parameter in the configuration of ``blip2`` by which a client learns how the checkpoint was shown questions."""

MODEL_VERSION = "1"
"""The one version folder of each Triton model in a bundle."""

GRAPH_FILE = "model.onnx"
"""ONNX graph of ``vision_encoder`` and ``qformer``, in their version folder."""

DECODER_FILE = "decoder.onnx"
"""ONNX graph of the language model, or of its decoder, in the version folder of ``blip2``."""

ENCODER_FILE = "encoder.onnx"
"""ONNX graph of the language model's encoder, if it has one, in the version folder of ``blip2``."""

TOKENIZER_FILE = "tokenizer.json"
"""Tokenizer of the language model (``tokenizers`` format), in the version folder of ``blip2``."""

QFORMER_TOKENIZER_FILE = "qformer_tokenizer.json"
"""Tokenizer of a Q-Former that reads instructions, beside the language model's."""

DType = Literal["FP32", "FP16", "INT64", "INT32", "UINT64", "BOOL", "BYTES"]
"""Tensor types, by Triton's client-side names."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model: its name, element type and shape without the batch dimension."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    optional: bool = False
    ragged: bool = False
    """Whether requests of different shapes may share a batch; the model pads them."""


@dataclass(frozen=True)
class ModelSpec:
    """The inputs and outputs of one Triton model or graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


IMAGE = TensorSpec("image", "BYTES", (1,))
"""An encoded image file (JPEG, PNG, WebP, ...); as text, base64 or a ``data:`` URL of one."""

PIXEL_VALUES = TensorSpec("pixel_values", "FP32", (3, "image_size", "image_size"))
IMAGE_EMBEDS = TensorSpec("image_embeds", "FP32", ("num_image_tokens", "vision_hidden_size"))
SOFT_TOKENS = TensorSpec("soft_tokens", "FP32", ("num_query_tokens", "decoder_hidden_size"))
"""The Q-Former's output, projected to the width of the language model: one soft token a query."""

QFORMER_INPUT_IDS = TensorSpec("qformer_input_ids", "INT64", (-1,), ragged=True)
"""Ids of an instruction, by the Q-Former's own tokenizer; in the graph (B, S), padded to one length."""
QFORMER_ATTENTION_MASK = TensorSpec("qformer_attention_mask", "INT64", (-1,), ragged=True)
"""1 for each id of an instruction, 0 for padding."""
INSTRUCTION = (QFORMER_INPUT_IDS, QFORMER_ATTENTION_MASK)

PREPROCESS_SPEC = ModelSpec(PREPROCESS, (IMAGE,), (PIXEL_VALUES,))
VISION_ENCODER_SPEC = ModelSpec(VISION_ENCODER, (PIXEL_VALUES,), (IMAGE_EMBEDS,))
QFORMER_SPEC = ModelSpec(QFORMER, (IMAGE_EMBEDS,), (SOFT_TOKENS,))
IMAGE_FEATURES_SPEC = ModelSpec(IMAGE_FEATURES, (IMAGE,), (SOFT_TOKENS,))
INSTRUCTED_QFORMER_SPEC = ModelSpec(QFORMER, (IMAGE_EMBEDS, *INSTRUCTION), (SOFT_TOKENS,))
"""``qformer`` where the Q-Former reads an instruction as well (:class:`InstructionSection`)."""
INSTRUCTED_IMAGE_FEATURES_SPEC = ModelSpec(IMAGE_FEATURES, (IMAGE, *INSTRUCTION), (SOFT_TOKENS, IMAGE_EMBEDS))
"""It gives ``image_embeds`` too: another instruction about the same image needs the Q-Former alone."""


def _optional(name: str, dtype: DType, shape: tuple[int | str, ...] = (1,)) -> TensorSpec:
    return TensorSpec(name, dtype, shape, optional=True)


BLIP2_INPUTS = (
    _optional("image", "BYTES", (-1,)),
    _optional("image_input", "FP16", (3, -1, -1)),
    _optional("text_input", "BYTES"),
    _optional("max_tokens", "INT32"),
    _optional("min_tokens", "INT32"),
    _optional("min_length", "INT32"),
    _optional("temperature", "FP32"),
    _optional("top_k", "INT32"),
    _optional("top_p", "FP32"),
    _optional("repetition_penalty", "FP32"),
    _optional("presence_penalty", "FP32"),
    _optional("frequency_penalty", "FP32"),
    _optional("length_penalty", "FP32"),
    _optional("beam_width", "INT32"),
    _optional("random_seed", "UINT64"),
    _optional("stop_words", "BYTES", (-1,)),
    _optional("bad_words", "BYTES", (-1,)),
    _optional("stream", "BOOL"),
    _optional("return_log_probs", "BOOL"),
    _optional("exclude_input_in_output", "BOOL"),
)
"""Inputs of ``blip2``: names, types and shapes of NVIDIA's own ensembles, plus ``image``: one file, or as many as the
model reads frames of a video."""

BLIP2_OUTPUTS = (
    TensorSpec("text_output", "BYTES", (-1,)),
    TensorSpec("finish_reason", "BYTES", (-1,)),
    TensorSpec("num_input_tokens", "INT32", (-1,)),
    TensorSpec("num_output_tokens", "INT32", (-1,)),
    TensorSpec("output_ids", "INT32", (-1, -1)),
    TensorSpec("sequence_index", "INT32", (-1,)),
    TensorSpec("cum_log_probs", "FP32", (-1,)),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
)
"""Outputs of ``blip2``. While a stream runs, ``finish_reason`` is an empty string and the counts are those so far.
``output_ids`` holds the tokens since the last response, the end token included."""

ERROR_CODES = ("INVALID_ARGUMENT", "UNAVAILABLE", "INTERNAL")
"""Why ``blip2`` fails a request, by gRPC's names. Such a name and ": " begin the message of each of its errors, because
a response stream of Triton carries an error's message without its code."""

BLIP2_SPEC = ModelSpec(BLIP2, BLIP2_INPUTS, BLIP2_OUTPUTS)
BLIP2_UNARY_SPEC = ModelSpec(BLIP2_UNARY, BLIP2_INPUTS, BLIP2_OUTPUTS)

MODEL_NAMES = (PREPROCESS, VISION_ENCODER, QFORMER, IMAGE_FEATURES, BLIP2, BLIP2_UNARY)
"""Every Triton model of a bundle, in the order in which they depend on each other."""


def triton_models(*, instructed: bool) -> tuple[ModelSpec, ...]:
    """The models of :data:`MODEL_NAMES`, for a Q-Former that reads instructions or for one that does not."""
    qformer = INSTRUCTED_QFORMER_SPEC if instructed else QFORMER_SPEC
    image_features = INSTRUCTED_IMAGE_FEATURES_SPEC if instructed else IMAGE_FEATURES_SPEC
    return (PREPROCESS_SPEC, VISION_ENCODER_SPEC, qformer, image_features, BLIP2_SPEC, BLIP2_UNARY_SPEC)


# --- the language model's graphs ---------------------------------------------------------------------------------
#
# A decoder-only model is ``decoder.onnx``: one graph for prefill (S = prompt length, rows padded on the right) and for
# decode step (S = 1), B rows at once:
#
#   input_ids              INT64 (B, S)   token ids; -(1 + k) stands for row k of ``soft_tokens``
#   soft_tokens            FP32  (N, D)   soft tokens of all rows, one after the other; N >= 1 (unused when decoding)
#   position_ids           INT64 (B, S)   position of each token in its own sequence, from 0
#   last_index             INT64 (B,)     index in 0..S-1 of the token whose logits are wanted
#   seqlens_k              INT32 (B,)     tokens in the cache after this call, minus one, for each row
#   total_sequence_length  INT32 ()       the largest of (seqlens_k + 1); equals S in a prefill. Larger than S > 1, for
#                                         one row alone, it says that the row's first tokens are in the cache already
#   past_key.{i}, past_value.{i}        FP32 (B, H_kv, T, D_head) for each layer i, T = slots' capacity in tokens
#   logits                 FP32  (B, V)
#   present_key.{i}, present_value.{i}  same shape; bound to the memory of past_*: the cache is updated in place
#
# An encoder-decoder is two graphs. ``encoder.onnx`` reads whole prompts:
#
#   input_ids              INT64 (B, S)   as above
#   soft_tokens            FP32  (N, D)   as above
#   lengths                INT32 (B,)     tokens of each row; the rest is padding
#   cross_key.{i}, cross_value.{i}      FP32 (B, H, S, D_head) for each layer i of the decoder
#
# and its ``decoder.onnx`` reads one token a row, S = 1, from the start token on: input_ids, position_ids, seqlens_k,
# total_sequence_length, the cache and logits are as above, and besides there are
#
#   cross_seqlens_k        INT32 (B,)     tokens that the encoder has read for each row, minus one
#   cross_total_sequence_length INT32 ()  the largest of (cross_seqlens_k + 1)
#   past_cross_key.{i}, past_cross_value.{i}        FP32 (B, H, T_prompt, D_head): what the encoder gave, in rows of
#                                                   T_prompt tokens
#   present_cross_key.{i}, present_cross_value.{i}  same shape; bound to the memory of past_cross_*, and unchanged
#
# That is how ONNX Runtime's graphs for the CPU are. A graph for a GPU says two things more about each row of the
# logits, which then stay on the GPU until someone wants them:
#
#   argmax                 INT64 (B,)     index of the first of the largest
#   logit_sums             FP32  (B,)     their sum, which is finite unless one of them is not or it overflows
#
# In a graph that computes in half precision, caches have its type. A
# graph may do without inputs that it has no use for and outputs that are inputs (``DecoderIO.optional``).


@dataclass(frozen=True)
class DecoderIO:
    """Tensor names of the decoder's graph; shapes are listed in the comment above this class."""

    input_ids: str = "input_ids"
    soft_tokens: str = "soft_tokens"
    position_ids: str = "position_ids"
    last_index: str = "last_index"
    seqlens_k: str = "seqlens_k"
    total_sequence_length: str = "total_sequence_length"
    cross_seqlens_k: str = "cross_seqlens_k"
    cross_total_sequence_length: str = "cross_total_sequence_length"
    logits: str = "logits"
    argmax: str = "argmax"
    sums: str = "logit_sums"

    def cache_inputs(self, num_layers: int) -> list[str]:
        """Names of the cache's inputs: key and value of layer 0, of layer 1, ..."""
        return [f"past_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]

    def cache_outputs(self, num_layers: int) -> list[str]:
        """Names of the cache's outputs, in the order of :meth:`cache_inputs`."""
        return [f"present_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]

    def cross_inputs(self, num_layers: int) -> list[str]:
        """Names of the inputs of the cross-attention's cache, in the order of :meth:`cache_inputs`."""
        return [f"past_cross_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]

    def cross_outputs(self, num_layers: int) -> list[str]:
        """Names of the outputs of the cross-attention's cache, in the order of :meth:`cache_inputs`."""
        return [f"present_cross_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]

    def optional(self, num_layers: int) -> frozenset[str]:
        """Names that a graph need not have: positions and the largest lengths, where all follows from each row's own
        length; the cross-attention's cache as an output, since it is not changed; and what is said of the logits."""
        implied = (self.position_ids, self.total_sequence_length, self.cross_total_sequence_length)
        return frozenset((*implied, *self.cross_outputs(num_layers), self.argmax, self.sums))


@dataclass(frozen=True)
class EncoderIO:
    """Tensor names of the encoder's graph; shapes are listed in the comment above :class:`DecoderIO`."""

    input_ids: str = "input_ids"
    soft_tokens: str = "soft_tokens"
    lengths: str = "lengths"

    def outputs(self, num_layers: int) -> list[str]:
        """Names of the outputs: key and value for layer 0 of the decoder, for layer 1, ..."""
        return [f"cross_{part}.{layer}" for layer in range(num_layers) for part in ("key", "value")]


DECODER_IO = DecoderIO()
ENCODER_IO = EncoderIO()
