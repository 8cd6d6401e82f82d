"""From a wrapper to an ONNX file: sample inputs, names, free dimensions, lowering, and the same bytes every time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from blipstream.contract import DECODER_IO, IMAGE_EMBEDS, INSTRUCTION, PIXEL_VALUES, SOFT_TOKENS, DecoderSection
from blipstream_export.lowering import lowering

OPSET = 21
"""The newest opset that ONNX Runtime 1.22 and TensorRT 10 read alike; it has Gelu and LayerNormalization."""

EXTERNAL_DATA_BYTES = 512 * 1024 * 1024
"""Graphs whose weights are larger keep them in a file of their own; a protobuf ends at 2 GiB."""

_INLINE_BYTES = 1024
"""Tensors smaller than this stay in the graph file, where shape inference can read them."""

FreeDims = dict[int, str]


@dataclass(frozen=True)
class GraphInputs:
    """What ``torch.onnx.export`` wants to know: sample tensors, their free dimensions, and names."""

    args: tuple[Any, ...]
    free_dims: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]


@dataclass(frozen=True)
class Graph:
    """One graph of a language model: its file in the version folder of ``blip2``, and what goes into it."""

    file: str
    module: nn.Module
    inputs: GraphInputs


def vision_inputs(image_size: int) -> GraphInputs:
    """Inputs of the vision encoder for square images of ``image_size`` pixels."""
    sample = torch.zeros(2, 3, image_size, image_size)
    return GraphInputs((sample,), ({0: "batch"},), [PIXEL_VALUES.name], [IMAGE_EMBEDS.name])


def qformer_inputs(num_image_tokens: int, vision_hidden_size: int, *, instructed: bool = False) -> GraphInputs:
    """Inputs of the Q-Former, with those of an instruction where it reads one."""
    batch, length = 2, 3
    image_embeds = torch.zeros(batch, num_image_tokens, vision_hidden_size)
    if not instructed:
        return GraphInputs((image_embeds,), ({0: "batch"},), [IMAGE_EMBEDS.name], [SOFT_TOKENS.name])
    tokens: FreeDims = {0: "batch", 1: "sequence"}
    return GraphInputs(
        args=(image_embeds, *(torch.ones(batch, length, dtype=torch.int64) for _ in INSTRUCTION)),
        free_dims=({0: "batch"}, *(tokens for _ in INSTRUCTION)),
        input_names=[IMAGE_EMBEDS.name, *(tensor.name for tensor in INSTRUCTION)],
        output_names=[SOFT_TOKENS.name],
    )


def decoder_inputs(sizes: DecoderSection) -> GraphInputs:
    """Inputs of a decoder-only language model, as declared in ``blipstream.contract``.

    The sample sizes differ from each other, from 0 and from 1, so that no dimension is mistaken for another or for a
    constant.
    """
    batch, length, capacity, num_soft = 2, 3, 7, 5
    rows: FreeDims = {0: "batch"}
    tokens: FreeDims = {0: "batch", 1: "sequence"}
    small: dict[str, tuple[Tensor, FreeDims | None]] = {
        DECODER_IO.input_ids: (torch.zeros(batch, length, dtype=torch.int64), tokens),
        DECODER_IO.soft_tokens: (torch.zeros(num_soft, sizes.hidden_size), {0: "num_soft_tokens"}),
        DECODER_IO.position_ids: (torch.zeros(batch, length, dtype=torch.int64), tokens),
        DECODER_IO.last_index: (torch.zeros(batch, dtype=torch.int64), rows),
        DECODER_IO.seqlens_k: (torch.full((batch,), length - 1, dtype=torch.int32), rows),
        DECODER_IO.total_sequence_length: (torch.tensor(length, dtype=torch.int32), None),
    }
    cache = [
        torch.zeros(batch, sizes.num_key_value_heads, capacity, sizes.head_dim) for _ in range(2 * sizes.num_layers)
    ]
    cache_dims: list[FreeDims] = [{0: "batch", 2: "capacity"} for _ in cache]
    return GraphInputs(
        args=(*(sample for sample, _ in small.values()), cache),
        free_dims=(*(dims for _, dims in small.values()), cache_dims),
        input_names=[*small, *DECODER_IO.cache_inputs(sizes.num_layers)],
        output_names=[DECODER_IO.logits, *DECODER_IO.cache_outputs(sizes.num_layers)],
    )


def export_graph(module: nn.Module, inputs: GraphInputs, path: Path, *, engine: str) -> int:
    """Write ``module`` as an ONNX graph for ``engine`` to ``path``; return the bytes of its files.

    Weights above :data:`EXTERNAL_DATA_BYTES` go to ``path`` + ``.data``. The same module gives the same bytes.
    """
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            inputs.args,
            dynamo=True,
            dynamic_shapes=inputs.free_dims,
            input_names=inputs.input_names,
            output_names=inputs.output_names,
            custom_translation_table=lowering(engine),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _strip(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _save(model, path)
    finally:
        for value in model.graph.initializers.values():
            value.const_value = None  # the exporter keeps its last graph, which must not keep the weights


def _save(model: ir.Model, path: Path) -> int:
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights <= EXTERNAL_DATA_BYTES:
        ir.save(model, path)
        return path.stat().st_size
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
    return path.stat().st_size + data.stat().st_size


def _strip(model: ir.Model) -> None:
    """Drop stack traces, module names and comments: they hold paths of the building machine and differ between runs."""
    model.producer_name, model.producer_version = "blipstream", None
    model.doc_string = model.graph.doc_string = None
    holders: list[Mapping[str, str]] = [model.metadata_props, model.graph.metadata_props]
    for node in model.graph.all_nodes():
        node.doc_string = None
        holders.append(node.metadata_props)
        holders += [value.metadata_props for value in node.outputs]
    holders += [value.metadata_props for value in (*model.graph.inputs, *model.graph.initializers.values())]
    for holder in holders:
        holder.clear()  # type: ignore[attr-defined]


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes on missing torchvision operators, and on its own deprecated calls, off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"# The axis name", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)
