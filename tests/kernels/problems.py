"""Inputs of a cross-attention, drawn for tests, and the errors that are allowed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from blipstream_kernels import reference
from torch import Tensor

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Error that is always allowed, of the largest output: about an ulp of the half precisions."""


@dataclass(frozen=True)
class Inputs:
    """What :func:`blipstream_kernels.launch.cross_attention` takes first."""

    query: Tensor
    image: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    num_heads: int
    scale: float | None = None
    key_mask: Tensor | None = None

    @property
    def arguments(self) -> tuple[object, ...]:
        return tuple(vars(self).values())

    def truth(self) -> Tensor:
        """The answer in fp64."""
        return reference.cross_attention(*self.arguments, dtype=torch.float64)  # type: ignore[arg-type]

    def yardstick(self) -> Tensor:
        """The answer that torch gives in the inputs' own dtype."""
        return reference.cross_attention(*self.arguments)  # type: ignore[arg-type]

    def with_(self, **changes: object) -> Inputs:
        return replace(self, **changes)  # type: ignore[arg-type]


def draw(
    *,
    batch: int = 2,
    heads: int = 2,
    queries: int = 5,
    tokens: int = 37,
    width: int = 40,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    masked: bool = False,
    sharpness: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Draw inputs; scores have about the standard deviation ``sharpness``, and image tokens a common offset."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    hidden = heads * head_dim
    mask = torch.rand(batch, tokens, generator=random) < 0.6 if masked else None
    tensors = [
        normal(batch, queries, hidden) * sharpness,
        normal(batch, tokens, width) + normal(width) * 0.5,
        normal(hidden, width) * width**-0.5,
        normal(hidden),
        normal(hidden, width) * width**-0.5,
        normal(hidden),
    ]
    moved = [tensor.to(device, dtype) for tensor in tensors]
    return Inputs(*moved, heads, None, None if mask is None else mask.to(device))


def assert_as_exact_as_torch(found: Tensor, inputs: Inputs) -> None:
    """The error is at most twice that of torch in the same dtype, plus a small floor.

    Where torch's own products overflow fp16, which the kernels' sums do not, the floor alone is allowed.
    """
    truth = inputs.truth()
    assert found.shape == truth.shape
    assert found.dtype == inputs.query.dtype
    assert bool(torch.isfinite(found).all())
    error = float((found.double() - truth).abs().max())
    yardstick = inputs.yardstick().double()
    of_torch = float((yardstick - truth).abs().max()) if bool(torch.isfinite(yardstick).all()) else 0.0
    allowed = 2 * of_torch + FLOOR[found.dtype] * float(truth.abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}; torch's own is {of_torch:.3g}"
