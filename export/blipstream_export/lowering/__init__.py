"""How the custom operators of :mod:`blipstream_export.ops` become nodes of an ONNX graph, for each engine.

One module for each engine; a lowering is a ``custom_translation_table`` of ``torch.onnx.export``.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from blipstream_export.lowering.onnxruntime import onnxruntime_lowering
from blipstream_export.lowering.operators import LoweringTable
from blipstream_export.lowering.tensorrt import finish_tensorrt, tensorrt_lowering

__all__ = ["LoweringTable", "finish", "lowering"]

_LOWERINGS: dict[str, Callable[[], LoweringTable]] = {
    "onnxruntime": onnxruntime_lowering,
    "tensorrt": tensorrt_lowering,
}
_FINISHES: dict[str, Callable[[ir.Model], None]] = {"tensorrt": finish_tensorrt}


def lowering(engine: str) -> LoweringTable:
    """The translation table of an engine, by its name in the manifest."""
    return _LOWERINGS[engine]()


def finish(engine: str, model: ir.Model) -> None:
    """Do to an exported graph what no translation of a single operator can do."""
    if engine in _FINISHES:
        _FINISHES[engine](model)
