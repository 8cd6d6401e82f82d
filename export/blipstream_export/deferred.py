"""Tensors that are computed when they are asked for: checkpoints larger than memory as ordinary torch modules.

A :class:`Deferred` tensor has a shape and a type, and a recipe in place of a value. An operation on deferred tensors
alone is recorded: it gives another deferred tensor, whatever its size. An operation that also sees a real tensor, or
whose result is no tensor, is run: the deferred ones are computed for it and dropped again. So a module of transformers
whose parameters are deferred loads, is rearranged by a wrapper (fused, padded, transposed) and even runs (within
:func:`computing`), and never holds more than one weight.

The idea is that of deferred initialisation (torchdistX), with the tensors of a checkpoint's files in the place of
random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_computing: list[None] = []
"""One entry for each block of :func:`computing` that is being run."""


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a file."""

    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Result:
    """Output number ``index`` of an operation, or its only one."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None

    def sources(self) -> Iterator[Deferred]:
        return (x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Deferred))


class Deferred(Tensor):
    """A tensor without a value; make one by :func:`deferred`, compute it by :func:`materialize`."""

    _meta: Tensor
    _recipe: _Leaf | _Result
    label: str | None
    """Name of the parameter that it is in the model (:func:`label_parameters`)."""

    @staticmethod
    def __new__(cls, meta: Tensor, recipe: _Leaf | _Result) -> Deferred:  # noqa: D102
        tensor: Deferred = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        tensor._meta, tensor._recipe, tensor.label = meta, recipe, None
        return tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"Deferred({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        copied = Deferred(self._meta, self._recipe)  # neither of which ever changes
        copied.label = self.label
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True  # what makes a subclass of Tensor a Parameter
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        with torch._C.DisableTorchFunctionSubclass():  # else a real result would be made a Deferred
            result = func(*args, **(kwargs or {}))
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]  # what nn.Module.to does to a parameter
            target, value = args
            before = Deferred(target._meta, target._recipe)
            before.label = target.label
            target._meta, target._recipe = value._meta, _substitute(value, target, before)._recipe
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        del types
        kwargs = kwargs or {}
        real = any(isinstance(x, Tensor) and not isinstance(x, Deferred) for x in tree_leaves((args, kwargs)))
        if real or _computing or torch.Tag.data_dependent_output in func.tags:
            return func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write into a tensor that is not computed yet")
        shapes = {**tree_map(_shape, kwargs), **({"device": "meta"} if "device" in kwargs else {})}
        output = func(*tree_map(_shape, args), **shapes)
        if isinstance(output, Tensor):
            return Deferred(output, _Result(func, args, kwargs, None))
        if isinstance(output, (list, tuple)):
            return type(output)(Deferred(x, _Result(func, args, kwargs, i)) for i, x in enumerate(output))
        return output


def deferred(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> Deferred:
    """A tensor that ``read`` gives when it is needed; it is called each time, and nothing is kept."""
    return Deferred(torch.empty(shape, dtype=dtype, device="meta"), _Leaf(read))


def defer_all(tensors: Mapping[str, Tensor]) -> dict[str, Deferred]:
    """Deferred tensors whose values are the given ones: for tensors that are mapped from disk."""
    return {name: deferred(tuple(x.shape), x.dtype, partial(_itself, x)) for name, x in tensors.items()}


@contextmanager
def computing() -> Iterator[None]:
    """Within the block nothing is recorded: what a model makes of its own parameters alone is computed as well."""
    _computing.append(None)
    try:
        yield
    finally:
        _computing.pop()


def materialize(tensor: Tensor) -> Tensor:
    """The value of a tensor: computed from its recipe if it is deferred, itself otherwise."""
    if not isinstance(tensor, Deferred):
        return tensor.detach()
    with torch.no_grad():
        value: Tensor = _compute(tensor)
    return value


def label_parameters(module: torch.nn.Module) -> None:
    """Give each deferred parameter its name in ``module``; a shared one keeps the first."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, Deferred):
            parameter.label = name


def labels(tensor: Tensor) -> set[str]:
    """Names of the labelled parameters that a tensor is made of."""
    if not isinstance(tensor, Deferred):
        return set()
    if tensor.label is not None:
        return {tensor.label}
    if isinstance(tensor._recipe, _Leaf):
        return set()
    return set().union(*(labels(source) for source in tensor._recipe.sources()))


def stored_types(tensor: Tensor) -> set[torch.dtype]:
    """Types, in their files, of the tensors that a tensor is made of; none if it is not deferred."""
    if not isinstance(tensor, Deferred):
        return set()
    if isinstance(tensor._recipe, _Leaf):
        return {tensor.dtype}
    return set().union(*(stored_types(source) for source in tensor._recipe.sources()))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _compute(tensor: Deferred) -> Any:
    recipe = tensor._recipe
    if isinstance(recipe, _Leaf):
        return recipe.read()
    output = recipe.operation(*tree_map(_value, recipe.args), **tree_map(_value, recipe.kwargs))
    return output if recipe.index is None else output[recipe.index]


def _substitute(tensor: Deferred, old: Deferred, new: Deferred) -> Deferred:
    """``tensor``, made of ``new`` wherever it was made of ``old``."""
    if tensor is old:
        return new
    recipe = tensor._recipe
    if isinstance(recipe, _Leaf) or not any(True for _ in recipe.sources()):
        return tensor

    def replaced(x: Any) -> Any:
        return _substitute(x, old, new) if isinstance(x, Deferred) else x

    args, kwargs = tree_map(replaced, recipe.args), tree_map(replaced, recipe.kwargs)
    return Deferred(tensor._meta, _Result(recipe.operation, args, kwargs, recipe.index))


def _value(x: Any) -> Any:
    return _compute(x) if isinstance(x, Deferred) else x


def _shape(x: Any) -> Any:
    return x._meta if isinstance(x, Deferred) else x
