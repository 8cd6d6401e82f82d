"""How the custom operators of :mod:`blipstream_export.ops` become nodes of an ONNX graph, for each engine.

A lowering is a ``custom_translation_table`` of ``torch.onnx.export``. ONNX Runtime's operators are contrib operators of
the domain ``com.microsoft``; their schemas are declared here as far as they are used, since the onnx package knows them
not (source: docs/ContribOperators.md of ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch

from blipstream_export import ops  # noqa: F401  (registers the operators)

_DOMAIN = "com.microsoft"
_Schema = onnx.defs.OpSchema

LoweringTable = dict[Any, Callable[..., Any]]


def onnxruntime_lowering() -> LoweringTable:
    """MultiHeadAttention and GroupQueryAttention of ONNX Runtime.

    On the CPU, GroupQueryAttention wants a head size that is a multiple of 8 (the wrappers pad it), and a call of
    several rows must be a prefill of empty rows or a step of one token.
    """
    return {
        torch.ops.blipstream.attention.default: _multi_head_attention,
        torch.ops.blipstream.cached_attention.default: _group_query_attention,
    }


def lowering(engine: str) -> LoweringTable:
    """The translation table of an engine, by its name in the manifest."""
    return {"onnxruntime": onnxruntime_lowering}[engine]()


def _multi_head_attention(
    query: Any, key: Any, value: Any, num_heads: int, scale: float, key_padding_mask: Any = None
) -> Any:
    bias = None  # of the projections, which the wrappers add themselves
    inputs = (query, key, value) if key_padding_mask is None else (query, key, value, bias, key_padding_mask)
    return _MULTI_HEAD_ATTENTION(*inputs, num_heads=num_heads, scale=scale)


def _group_query_attention(
    qkv: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> Any:
    return _GROUP_QUERY_ATTENTION(
        qkv,
        None,  # key and value are packed behind the query
        None,
        past_key,
        past_value,
        seqlens_k,
        total_sequence_length,
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=scale,
    )


def _operator(name: str, inputs: list[str], outputs: list[str], attributes: dict[str, Any]) -> Any:
    """A contrib operator; inputs read ``name``, ``name?`` (optional), ``name:M`` or ``name?:M`` (of type M = int32)."""
    schema = _Schema(
        name,
        _DOMAIN,
        1,
        inputs=[_parameter(spec) for spec in inputs],
        outputs=[_parameter(spec) for spec in outputs],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activations"),
            ("M", ["tensor(int32)"], "lengths and masks"),
        ],
        attributes=[_Schema.Attribute(key, kind) for key, kind in attributes.items()],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(_DOMAIN, 1), name, schema)


def _parameter(spec: str) -> Any:
    name, _, kind = spec.partition(":")
    options = _Schema.FormalParameterOption
    option = options.Optional if name.endswith("?") else options.Single
    return _Schema.FormalParameter(name.removesuffix("?"), kind or "T", param_option=option)


_MULTI_HEAD_ATTENTION = _operator(
    "MultiHeadAttention",
    ["query", "key", "value", "bias?", "key_padding_mask?:M"],
    ["output"],
    {"num_heads": _Schema.AttrType.INT, "scale": _Schema.AttrType.FLOAT},
)

_GROUP_QUERY_ATTENTION = _operator(
    "GroupQueryAttention",
    ["query", "key?", "value?", "past_key?", "past_value?", "seqlens_k:M", "total_sequence_length:M"],
    ["output", "present_key", "present_value"],
    {"num_heads": _Schema.AttrType.INT, "kv_num_heads": _Schema.AttrType.INT, "scale": _Schema.AttrType.FLOAT},
)
