"""From a wrapper to an ONNX file: sample inputs, names, free dimensions, lowering, and the same bytes every time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from blipstream.contract import DECODER_IO, ENCODER_IO, IMAGE_EMBEDS, INSTRUCTION, PIXEL_VALUES, SOFT_TOKENS
from blipstream.manifest import DecoderSection, Precision
from blipstream_export.activations import Activations
from blipstream_export.deferred import Deferred, labels, materialize, stored_types
from blipstream_export.initializers import SharedWeights, WeightTensor, write_model
from blipstream_export.lowering import finish, lowering
from blipstream_export.quantized_graph import OnLayer, quantize_graph
from blipstream_export.typed import Typed, convert, weight_types

OPSET = 21
"""The newest opset that ONNX Runtime 1.22 and TensorRT 10 read alike; it has Gelu and LayerNormalization."""

FreeDims = dict[int, str]


@dataclass(frozen=True)
class GraphInputs:
    """What ``torch.onnx.export`` wants to know: sample tensors, their free dimensions, and names."""

    args: tuple[Any, ...]
    free_dims: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    cached: frozenset[str] = frozenset()
    """Names of what is kept in a cache: it has the type that the graph computes in, and all else is float32."""

    def fixed(self, sizes: Mapping[str, int]) -> GraphInputs:
        """The same with some of the free dimensions fixed: ``sizes`` maps their names."""
        args, free_dims = _fix(self.args, self.free_dims, sizes)
        return replace(self, args=args, free_dims=free_dims)

    def typed(self, dtype: torch.dtype) -> GraphInputs:
        """The same for a graph that computes in ``dtype``: sample caches have it as well."""
        names = iter(self.input_names)
        return replace(self, args=tree_map(lambda x: x.to(dtype) if next(names) in self.cached else x, self.args))


@dataclass(frozen=True)
class Graph:
    """One graph of a language model: its file in the version folder of ``blip2``, and what goes into it."""

    file: str
    module: nn.Module
    inputs: GraphInputs
    head_tables: tuple[str, ...] = ()
    """Names, in the module, of embeddings that another graph of the language model multiplies with as its head."""


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


_BATCH, _LENGTH, _CAPACITY, _PROMPT_CAPACITY, _NUM_SOFT = 2, 3, 7, 11, 5
"""Sizes of the language model's samples: they differ from each other, from 0 and from 1, so that no dimension is
mistaken for another or for a constant."""

_ROWS: FreeDims = {0: "batch"}
_TOKENS: FreeDims = {0: "batch", 1: "sequence"}
_Samples = dict[str, tuple[Tensor, FreeDims | None]]


def decoder_inputs(sizes: DecoderSection) -> GraphInputs:
    """Inputs of a decoder-only language model, as declared in ``blipstream.contract``."""
    small: _Samples = {
        DECODER_IO.input_ids: (torch.zeros(_BATCH, _LENGTH, dtype=torch.int64), _TOKENS),
        DECODER_IO.soft_tokens: (torch.zeros(_NUM_SOFT, sizes.hidden_size), {0: "num_soft_tokens"}),
        DECODER_IO.position_ids: (torch.zeros(_BATCH, _LENGTH, dtype=torch.int64), _TOKENS),
        DECODER_IO.last_index: (torch.zeros(_BATCH, dtype=torch.int64), _ROWS),
        DECODER_IO.seqlens_k: _lengths(_LENGTH),
        DECODER_IO.total_sequence_length: _longest(_LENGTH),
    }
    names = [DECODER_IO.logits, *DECODER_IO.cache_outputs(sizes.num_layers)]
    return _graph_inputs(small, [_cache(sizes)], DECODER_IO.cache_inputs(sizes.num_layers), names)


def encoder_inputs(sizes: DecoderSection) -> GraphInputs:
    """Inputs of the encoder of an encoder-decoder."""
    small: _Samples = {
        ENCODER_IO.input_ids: (torch.zeros(_BATCH, _LENGTH, dtype=torch.int64), _TOKENS),
        ENCODER_IO.soft_tokens: (torch.zeros(_NUM_SOFT, sizes.hidden_size), {0: "num_soft_tokens"}),
        ENCODER_IO.lengths: (torch.full((_BATCH,), _LENGTH, dtype=torch.int32), _ROWS),
    }
    inputs = _graph_inputs(small, [], [], ENCODER_IO.outputs(sizes.num_layers))
    return replace(inputs, cached=frozenset(inputs.output_names))


def stepping_decoder_inputs(sizes: DecoderSection) -> GraphInputs:
    """Inputs of the decoder of an encoder-decoder: one token a row."""
    small: _Samples = {
        DECODER_IO.input_ids: (torch.zeros(_BATCH, 1, dtype=torch.int64), _ROWS),
        DECODER_IO.position_ids: (torch.full((_BATCH, 1), _LENGTH - 1), _ROWS),
        DECODER_IO.seqlens_k: _lengths(_LENGTH),
        DECODER_IO.total_sequence_length: _longest(_LENGTH),
        DECODER_IO.cross_seqlens_k: _lengths(_PROMPT_CAPACITY),
        DECODER_IO.cross_total_sequence_length: _longest(_PROMPT_CAPACITY),
    }
    layers = sizes.num_layers
    return _graph_inputs(
        small,
        [_cache(sizes), _cross_cache(sizes)],
        [*DECODER_IO.cache_inputs(layers), *DECODER_IO.cross_inputs(layers)],
        [DECODER_IO.logits, *DECODER_IO.cache_outputs(layers), *DECODER_IO.cross_outputs(layers)],
    )


def _lengths(length: int) -> tuple[Tensor, FreeDims]:
    return torch.full((_BATCH,), length - 1, dtype=torch.int32), _ROWS


def _longest(length: int) -> tuple[Tensor, None]:
    return torch.tensor(length, dtype=torch.int32), None


def _cache(sizes: DecoderSection) -> tuple[list[Tensor], list[FreeDims]]:
    shape = (_BATCH, sizes.num_key_value_heads, _CAPACITY, sizes.head_dim)
    cache = [torch.zeros(shape) for _ in range(2 * sizes.num_layers)]
    return cache, [{0: "batch", 2: "capacity"} for _ in cache]


def _cross_cache(sizes: DecoderSection) -> tuple[list[Tensor], list[FreeDims]]:
    assert sizes.encoder is not None
    shape = (_BATCH, sizes.encoder.num_heads, _PROMPT_CAPACITY, sizes.encoder.head_dim)
    cache = [torch.zeros(shape) for _ in range(2 * sizes.num_layers)]
    return cache, [{0: "batch", 2: "prompt_capacity"} for _ in cache]


def _graph_inputs(
    small: _Samples,
    caches: list[tuple[list[Tensor], list[FreeDims]]],
    cache_names: list[str],
    output_names: list[str],
) -> GraphInputs:
    return GraphInputs(
        args=(*(sample for sample, _ in small.values()), *(cache for cache, _ in caches)),
        free_dims=(*(dims for _, dims in small.values()), *(dims for _, dims in caches)),
        input_names=[*small, *cache_names],
        output_names=output_names,
        cached=frozenset([*cache_names, *output_names]) - {DECODER_IO.logits},
    )


def _fix(args: Any, free_dims: Any, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """Samples and free dimensions, in the same nest of tuples and lists, with dimensions that ``sizes`` has fixed."""
    if not isinstance(args, Tensor):
        pairs = [_fix(arg, dims, sizes) for arg, dims in zip(args, free_dims, strict=True)]
        return type(args)(arg for arg, _ in pairs), type(free_dims)(dims for _, dims in pairs)
    fixed = {axis: sizes[name] for axis, name in (free_dims or {}).items() if name in sizes}
    if not fixed:
        return args, free_dims
    shape = [fixed.get(axis, size) for axis, size in enumerate(args.shape)]
    return args.new_zeros(shape), {axis: name for axis, name in free_dims.items() if axis not in fixed}


def export_graph(
    module: nn.Module,
    inputs: GraphInputs,
    path: Path,
    *,
    engine: str,
    precision: Precision = "fp32",
    dtype: torch.dtype = torch.float32,
    activations: Activations | None = None,
    head_tables: Sequence[str] = (),
    shared: SharedWeights | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    on_layer: OnLayer = lambda _layer: None,
) -> int:
    """Write ``module`` as an ONNX graph for ``engine`` to ``path``; return the bytes of its files.

    The graph is made without weights; these are computed, where they are deferred, and written one at a time. The same
    module gives the same bytes.

    Args:
        module: a wrapper, its parameters real or deferred.
        inputs: sample inputs and names.
        path: the ``.onnx`` file; large weights go to ``path`` + ``.data`` (:mod:`blipstream_export.initializers`).
        engine: its name in the manifest.
        precision: of the graph's weights; inputs and outputs are the same in every precision.
        dtype: what the graph computes in, where that is not float32: weights and activations have this type, and so
            have the caches (:mod:`blipstream_export.typed`); other inputs and outputs are float32 all the same.
        activations: what the linear layers read on samples, for int8.
        head_tables: as of :class:`Graph`.
        shared: weights of graphs in the same folder, which are not stored again.
        on_progress: is called with how many bytes of the weights are done, and how many there are.
        on_layer: is told how each matrix is quantized.
    """
    inputs = inputs.typed(dtype)
    types = weight_types(module, dtype)
    with _quiet_exporter(), torch.no_grad():
        with _without_weights(module, types) as weights:
            program = torch.onnx.export(
                Typed(module, dtype, inputs).eval(),
                inputs.args,
                dynamo=True,
                dynamic_shapes=(inputs.free_dims,),
                input_names=inputs.input_names,
                output_names=inputs.output_names,
                custom_translation_table=lowering(engine),
                opset_version=OPSET,
                verbose=False,
                optimize=False,  # it looks into small weights: below, where they have values
            )
        assert program is not None
        for name, value in program.model.graph.initializers.items():
            if (own := name.removeprefix(Typed.PREFIX)) in weights:
                tensor = weights[own]
                value.const_value = _weight_tensor(own, tensor, types.get(id(tensor), tensor.dtype))
        program.optimize()
        model = program.model
        _rename_weights(model)
        finish(engine, model)
        quantize_graph(model, precision, activations, head_tables, on_layer)
        _strip(model)
        try:
            return write_model(model, path, precision, shared=shared, on_progress=on_progress)
        finally:
            for value in model.graph.initializers.values():
                value.const_value = None  # the exporter keeps its last graph, which must not keep the weights


def _rename_weights(model: ir.Model) -> None:
    """Give weights the names that they have in the wrapper."""
    initializers = model.graph.initializers
    for name in [name for name in initializers if name.startswith(Typed.PREFIX)]:
        value = initializers.pop(name)
        value.name = name.removeprefix(Typed.PREFIX)
        initializers[value.name] = value


@contextmanager
def _without_weights(module: nn.Module, types: Mapping[int, torch.dtype]) -> Iterator[dict[str, Tensor]]:
    """Within the block, parameters and buffers of ``module`` have shapes and no values; it yields them as they were.

    ``types`` has the types, by a tensor's ``id``, of those that have another within the block.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    weights = {name: tensor for tensors in named for name, tensor in tensors}
    fakes: dict[int, Tensor] = {}
    places = [
        (holder, name, tensor)
        for part in module.modules()
        for holder in _tensor_dicts(part)
        for name, tensor in holder.items()
        if tensor is not None
    ]
    for holder, name, tensor in places:
        if id(tensor) not in fakes:
            with mode:
                fake = torch.empty(tensor.shape, dtype=types.get(id(tensor), tensor.dtype))
            fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
        holder[name] = fakes[id(tensor)]
    try:
        yield weights
    finally:
        for holder, name, tensor in places:
            holder[name] = tensor


def _tensor_dicts(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _weight_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> WeightTensor:
    types = stored_types(tensor)
    return WeightTensor(
        lambda: convert(materialize(tensor), dtype, name),
        dtype,
        tuple(tensor.shape),
        name=name,
        labels=frozenset(labels(tensor)),
        own_type=types.pop() if len(types) == 1 else None,
        may_round=isinstance(tensor, Deferred),
    )


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
