"""The weights of a graph: computed one at a time, stored as small as they lose nothing, written behind one another.

A graph is made without its weights. Each initializer holds a :class:`WeightTensor`, which knows how to compute one, and
:func:`write_model` computes, stores and forgets them in turn, so that memory is bounded by the largest of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from blipstream.manifest import Precision

EXTERNAL_DATA_BYTES = 512 * 1024 * 1024
"""Graphs whose weights are larger keep them in a file of their own; a protobuf ends at 2 GiB."""

_INLINE_BYTES = 1024
"""Tensors smaller than this stay in the graph file, where shape inference can read them."""

_ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector register: the file is mapped into memory."""

_HALF_TYPES = (torch.float16, torch.bfloat16)
_ROUNDED_TO: dict[Precision, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float16,  # what int8 and int4 leave: embeddings, convolutions
    "int4": torch.float16,
}
"""Type that matrices are rounded to; vectors (biases, norms) are small and stay as they are."""


class WeightTensor(ir.LazyTensor):
    """An initializer that is computed whenever it is read.

    Args:
        compute: gives the tensor; its type and shape are ``dtype`` and ``shape``.
        labels: names of the checkpoint's parameters that it is made of.
        own_type: the type to store it in if that loses nothing, such as that of the checkpoint's files.
        may_round: whether it may be rounded to the precision of its stage, as the checkpoint's weights may.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        *,
        name: str,
        labels: frozenset[str] = frozenset(),
        own_type: torch.dtype | None = None,
        may_round: bool = False,
    ) -> None:
        super().__init__(lambda: TorchTensor(compute(), name=name), from_torch_dtype(dtype), ir.Shape(shape), name=name)
        self.compute = compute
        self.labels = labels
        self.own_type = own_type
        self.may_round = may_round


class Parts:
    """Several tensors that are computed together and taken one by one; a tensor is kept until it is taken."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute
        self._ready: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The tensor called ``name``."""
        if name not in self._ready:
            self._ready = self._compute()
        return self._ready.pop(name)


class SharedWeights:
    """What the graphs of one folder have stored so far, so that a tensor that two of them use is stored once."""

    def __init__(self) -> None:
        self._stored: dict[tuple[bytes, ir.DataType, tuple[int, ...]], ir.ExternalTensor] = {}

    def store(self, file: IO[bytes], tensor: TorchTensor, data: Path) -> ir.ExternalTensor:
        """Where ``tensor`` is: in a file of an earlier graph, or from now on at the end of ``file``, whose path is
        ``data``."""
        content = tensor.numpy().reshape(-1).view("uint8")
        key = hashlib.blake2b(content.data).digest(), tensor.dtype, tuple(tensor.shape.numpy())
        known = self._stored.get(key)
        if known is None:
            known = self._stored[key] = _append(file, tensor, data)
        return _external(known, tensor.name)


def store_as(tensor: Tensor, precision: Precision, *, own_type: torch.dtype | None, may_round: bool) -> Tensor:
    """A float32 weight in the type that it is stored in.

    In fp16 and bf16 a matrix of the checkpoint is rounded to that type. Otherwise a weight is stored in the type that
    its checkpoint has it in, if it is then the same to the last bit; other matrices in int8 and int4 (those that are
    not multiplied with) are rounded to fp16. Nothing is rounded to a type whose range it exceeds.
    """
    rounded_to = _ROUNDED_TO.get(precision) if may_round and tensor.dim() > 1 else None
    if own_type in _HALF_TYPES and (rounded_to is None or precision in ("int8", "int4")):
        own = tensor.to(own_type)
        if torch.equal(own.float(), tensor):
            return own
    rounded = tensor.to(rounded_to or torch.float32)
    return rounded if bool(torch.isfinite(rounded).all()) else tensor


def write_model(
    model: ir.Model,
    path: Path,
    precision: Precision,
    *,
    shared: SharedWeights | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Compute and store every weight of ``model``, write the graph to ``path``, and return the bytes of its files.

    Weights above :data:`EXTERNAL_DATA_BYTES`, and all that other graphs of the folder may share, go to ``path`` +
    ``.data``. ``on_progress`` is called with how many bytes of weights are done, and how many there are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    values = list(model.graph.initializers.values())
    sizes = [value.const_value.nbytes if value.const_value else 0 for value in values]
    if shared is None and sum(sizes) <= EXTERNAL_DATA_BYTES:
        for value in values:
            _store(model.graph, value, precision)
        ir.save(model, path)
        return path.stat().st_size
    store = _append if shared is None else shared.store
    data, done = path.with_name(path.name + ".data"), 0
    with data.open("wb") as file:
        for value, size in zip(values, sizes, strict=True):
            on_progress(done, sum(sizes))
            done += size
            _store(model.graph, value, precision)
            tensor = value.const_value
            if isinstance(tensor, TorchTensor) and tensor.nbytes >= _INLINE_BYTES:
                value.const_value = store(file, tensor, data)
            del tensor  # before the next one is computed
    ir.save(model, path)
    return path.stat().st_size + data.stat().st_size


def _store(graph: ir.Graph, value: ir.Value, precision: Precision) -> None:
    """Give a weight its value, in the type that it is stored in; a Cast leads back to float32."""
    tensor = value.const_value
    if not isinstance(tensor, WeightTensor):
        return  # a constant of the graph, small
    stored = computed = tensor.compute()
    if computed.dtype == torch.float32:
        stored = store_as(computed, precision, own_type=tensor.own_type, may_round=tensor.may_round)
    held = TorchTensor(stored.contiguous(), name=value.name)
    value.dtype = held.dtype
    if stored.dtype != computed.dtype:
        _cast_back(graph, value)
    value.const_value = held


def _append(file: IO[bytes], tensor: TorchTensor, data: Path) -> ir.ExternalTensor:
    file.write(bytes(-file.tell() % _ALIGNMENT))
    offset = file.tell()
    tensor.tofile(file)
    return ir.ExternalTensor(
        data.name,
        offset,
        file.tell() - offset,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        base_dir=data.parent,
    )


def _external(stored: ir.ExternalTensor, name: str | None) -> ir.ExternalTensor:
    """The same place in the same file, under another name."""
    place = stored.location, stored.offset, stored.length
    return ir.ExternalTensor(*place, stored.dtype, shape=stored.shape, name=name or "", base_dir=stored.base_dir)


def _cast_back(graph: ir.Graph, value: ir.Value) -> None:
    """Let the users of ``value`` see float32: rows of a table are cast when they are looked up, all else at once.

    ONNX Runtime computes a Cast of a weight once, when it loads the graph.
    """
    others = []
    for node, index in list(value.uses()):
        if node.op_type == "Gather" and index == 0:
            _cast_behind(graph, node)
        else:
            others.append((node, index))
    if not others:
        return
    cast = _cast(value, f"{value.name}.float")
    first = next(node for node in graph if any(node is user for user, _ in others))
    graph.insert_before(first, cast)
    for node, index in others:
        node.replace_input_with(index, cast.outputs[0])


def _cast_behind(graph: ir.Graph, node: ir.Node) -> None:
    """Cast what ``node`` looks up; the result takes over its name."""
    output, table = node.outputs[0], node.inputs[0]
    assert table is not None
    name, output.name, output.type = output.name, f"{output.name}.stored", table.type
    cast = _cast(output, f"{name}")
    ir.convenience.replace_all_uses_with(output, cast.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    graph.insert_after(node, cast)


def _cast(value: ir.Value, name: str) -> ir.Node:
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    return ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[output], name=name)
