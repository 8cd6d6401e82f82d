"""Graphs that compute in half precision: the same wrappers, with weights, activations and caches of another type.

ONNX Runtime's CPU graphs compute in float32 whatever the type of their weights. An engine for a GPU computes in the
types that the graph has (TensorRT's networks are strongly typed), and then a wrapper is exported with weights of that
type: torch itself says which operation has which type, as it does for transformers' own half-precision models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from blipstream.errors import CheckpointError

if TYPE_CHECKING:
    from blipstream_export.graphs import GraphInputs


class Typed(nn.Module):
    """``module`` computing in ``dtype``; what is not kept in a cache goes in and comes out in float32.

    Args:
        module: a wrapper whose weights have the types of :func:`weight_types`.
        dtype: what it computes in.
        inputs: names of its inputs and outputs, and which of them are cached.
    """

    PREFIX: ClassVar[str] = "module."
    """What stands before the names of the wrapper's weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, inputs: GraphInputs) -> None:
        super().__init__()
        self.module = module
        self._dtype = dtype
        self._inputs = inputs

    def forward(self, *args: Any) -> Any:
        """Run the wrapper."""
        outputs = self.module(*tree_map(self._cast, args))
        if isinstance(outputs, Tensor):
            return outputs.float()
        names, cached = self._inputs.output_names, self._inputs.cached
        return tuple(x if name in cached else x.float() for name, x in zip(names, outputs, strict=True))

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._dtype) if x.is_floating_point() else x


def weight_types(module: nn.Module, dtype: torch.dtype) -> dict[int, torch.dtype]:
    """The type of each weight of a wrapper that computes in ``dtype``, by the tensor's ``id``.

    A part that fp16 overflows keeps float32: its owner names it in ``float32_in_fp16``.
    """
    wide = set()
    if dtype == torch.float16:
        for owner in module.modules():
            for name in getattr(owner, "float32_in_fp16", ()):
                wide |= {id(x) for x in getattr(owner, name).parameters()}
    tensors = [*module.parameters(), *module.buffers()]
    return {id(x): dtype for x in tensors if x.is_floating_point() and id(x) not in wide}


def convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in ``dtype``.

    Raises:
        CheckpointError: a value is beyond the range of ``dtype``.
    """
    converted = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not bool(torch.isfinite(converted).all()):
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"the weight {name} has values up to {largest:.3g}, beyond the range of fp16: expected precision bf16"
        )
    return converted
