"""Operators that the onnx package does not know, declared as far as they are used; and nodes in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript

Schema = onnx.defs.OpSchema

LoweringTable = dict[Any, Callable[..., Any]]
"""A ``custom_translation_table`` of ``torch.onnx.export``."""


def declare(
    domain: str,
    name: str,
    inputs: list[str],
    outputs: list[str],
    attributes: dict[str, Any],
    *,
    version: int = 1,
    like: int | None = None,
) -> Any:
    """An operator to call in a translation.

    Args:
        domain: of the operator.
        name: its type.
        inputs: each reads ``name``, ``name?`` (optional), ``name:M`` or ``name?:M`` (of type M, not of T).
        outputs: likewise.
        attributes: type of each.
        version: of the operator's set.
        like: index of the input whose type and shape the only output has; the onnx package then knows the operator
            when it infers shapes and checks a model.
    """
    opset = onnxscript.values.Opset(domain, version)
    schema = Schema(
        name,
        opset.domain,
        opset.version,
        inputs=[_parameter(spec) for spec in inputs],
        outputs=[_parameter(spec) for spec in outputs],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activations"),
            ("M", ["tensor(int32)"], "lengths and masks"),
            ("P", ["tensor(int64)"], "positions"),
            ("A", ["tensor(bool)", "tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "attention masks"),
        ],
        attributes=[Schema.Attribute(key, kind, required=False) for key, kind in attributes.items()],
    )
    if like is not None:

        def infer(context: Any) -> None:
            context.set_output_type(0, context.get_input_type(like))

        schema.set_type_and_shape_inference_function(infer)
        onnx.defs.register_schema(schema)
    return onnxscript.values.Op(opset, name, schema)


def put_in_place(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> None:
    """Put nodes in the place of another, whose outputs ``results`` become, with their names, shapes and types."""
    graph.insert_before(node, nodes)
    for output, result in zip(node.outputs, results, strict=True):
        result.shape, result.type, result.name = output.shape, output.type, output.name
        output.name = None
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _parameter(spec: str) -> Any:
    name, _, kind = spec.partition(":")
    options = Schema.FormalParameterOption
    option = options.Optional if name.endswith("?") else options.Single
    return Schema.FormalParameter(name.removesuffix("?"), kind or "T", param_option=option)
