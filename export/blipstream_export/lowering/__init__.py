"""How the custom operators of :mod:`blipstream_export.ops` become nodes of an ONNX graph, for each engine.

One module for each engine; a lowering is a ``custom_translation_table`` of ``torch.onnx.export``.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from blipstream_export.lowering.logits import reduce_logits
from blipstream_export.lowering.onnxruntime import onnxruntime_lowering
from blipstream_export.lowering.onnxruntime_cuda import finish_onnxruntime_cuda
from blipstream_export.lowering.operators import LoweringTable
from blipstream_export.lowering.tensorrt import finish_tensorrt, tensorrt_lowering

__all__ = ["LoweringTable", "finish", "lowering"]

_LOWERINGS: dict[str, Callable[[], LoweringTable]] = {
    "onnxruntime": onnxruntime_lowering,
    "onnxruntime-cuda": tensorrt_lowering,
    "tensorrt": tensorrt_lowering,
}
_FINISHES: dict[str, Callable[[ir.Model], None]] = {
    "onnxruntime-cuda": finish_onnxruntime_cuda,
    "tensorrt": finish_tensorrt,
}


def lowering(engine: str) -> LoweringTable:
    """The translation table of an engine, by its name in the manifest."""
    return _LOWERINGS[engine]()


def finish(engine: str, model: ir.Model) -> None:
    """Do to an exported graph what no translation of a single operator can do."""
    if engine in _FINISHES:
        reduce_logits(model)
        _FINISHES[engine](model)
