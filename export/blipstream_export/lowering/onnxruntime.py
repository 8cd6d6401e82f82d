"""The lowering for ONNX Runtime: its contrib operators, in the domain ``com.microsoft``.

Source of the schemas: docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnxscript
import torch

from blipstream_export import ops  # noqa: F401  (registers the operators)
from blipstream_export.lowering.operators import LoweringTable, Schema, declare

_DOMAIN = "com.microsoft"
_LOWEST = float(torch.finfo(torch.float32).min)
_op: Any = onnxscript.opset21


def onnxruntime_lowering() -> LoweringTable:
    """MultiHeadAttention, GroupQueryAttention and SimplifiedLayerNormalization of ONNX Runtime.

    On the CPU, GroupQueryAttention wants a head size that is a multiple of 8, with rotary positions of 16 (the wrappers
    pad it), and a call of several rows must be a prefill of empty rows or a step of one token.
    """
    return {
        torch.ops.blipstream.attention.default: _multi_head_attention,
        torch.ops.blipstream.cached_attention.default: _group_query_attention,
        torch.ops.blipstream.cross_attention.default: _group_query_cross_attention,
        torch.ops.blipstream.distance_bias.default: _distance_bias,
        torch.ops.blipstream.rms_norm.default: _simplified_layer_normalization,
    }


def _multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    num_heads: int,
    scale: float,
    key_padding_mask: Any = None,
    bias: Any = None,
) -> Any:
    return _MULTI_HEAD_ATTENTION(
        query,
        key,
        value,
        None,  # the bias of the projections, which the wrappers add themselves
        key_padding_mask,
        bias,
        num_heads=num_heads,
        scale=scale,
        mask_filter_value=_LOWEST,
    )


def _group_query_attention(
    qkv: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cos: Any = None,
    sin: Any = None,
    bias: Any = None,
) -> Any:
    return _GROUP_QUERY_ATTENTION(
        qkv,
        None,  # key and value are packed behind the query
        None,
        past_key,
        past_value,
        seqlens_k,
        total_sequence_length,
        cos,
        sin,
        None,  # the positions follow from the lengths
        bias,
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=scale,
        do_rotary=int(cos is not None),
    )


def _group_query_cross_attention(
    query: Any, key: Any, value: Any, seqlens_k: Any, total_sequence_length: Any, scale: float
) -> Any:
    """A step that appends to each row what stands at its end already, so that nothing changes: the operator reads the
    valid entries and no more, in place, each row at its own length."""
    num_heads, head_dim = key.shape[1], key.shape[3]
    last = _op.Reshape(_op.Cast(seqlens_k, to=onnx.TensorProto.INT64), [-1, 1, 1, 1])
    last = _op.Expand(last, [1, num_heads, 1, head_dim])  # (B, H, 1, D)
    new_key, new_value = (
        _op.Reshape(_op.GatherElements(cache, last, axis=2), [0, 1, num_heads * head_dim]) for cache in (key, value)
    )
    return _GROUP_QUERY_ATTENTION(
        query,
        new_key,
        new_value,
        key,
        value,
        seqlens_k,
        total_sequence_length,
        num_heads=num_heads,
        kv_num_heads=num_heads,
        scale=scale,
    )


def _distance_bias(table: Any, position_ids: Any, total_sequence_length: Any, cache: Any) -> Any:
    del cache
    keys = _op.Range(0, _op.Cast(total_sequence_length, to=onnx.TensorProto.INT64), 1)  # (L,)
    distances = _op.Clip(_op.Sub(position_ids, keys), 0, table.shape[0] - 1)  # (B, L)
    return _op.Unsqueeze(_op.Transpose(_op.Gather(table, distances), perm=[0, 2, 1]), [2])


def _simplified_layer_normalization(x: Any, weight: Any, epsilon: float) -> Any:
    return _SIMPLIFIED_LAYER_NORMALIZATION(x, weight, axis=-1, epsilon=epsilon)


_MULTI_HEAD_ATTENTION = declare(
    _DOMAIN,
    "MultiHeadAttention",
    ["query", "key", "value", "bias?", "key_padding_mask?:M", "attention_bias?"],
    ["output"],
    {
        "num_heads": Schema.AttrType.INT,
        "scale": Schema.AttrType.FLOAT,
        "mask_filter_value": Schema.AttrType.FLOAT,
    },
)

_GROUP_QUERY_ATTENTION = declare(
    _DOMAIN,
    "GroupQueryAttention",
    [
        "query",
        "key?",
        "value?",
        "past_key?",
        "past_value?",
        "seqlens_k:M",
        "total_sequence_length:M",
        "cos_cache?",
        "sin_cache?",
        "position_ids?:P",
        "attention_bias?",
    ],
    ["output", "present_key", "present_value"],
    {
        "num_heads": Schema.AttrType.INT,
        "kv_num_heads": Schema.AttrType.INT,
        "scale": Schema.AttrType.FLOAT,
        "do_rotary": Schema.AttrType.INT,
    },
)

_SIMPLIFIED_LAYER_NORMALIZATION = declare(
    "",  # ONNX Runtime keeps it in the domain of ONNX itself
    "SimplifiedLayerNormalization",
    ["X", "scale"],
    ["Y"],
    {"axis": Schema.AttrType.INT, "epsilon": Schema.AttrType.FLOAT},
    version=_op.version,
)
