"""Quantizing weights: one matrix at a time, in torch.

int8 is symmetric, with one scale for each output channel. int4 is symmetric, with one scale for each block of
:data:`BLOCK` inputs of an output channel, in the layout of com.microsoft ``MatMulNBits`` (docs/ContribOperators.md of
ONNX Runtime).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Weights that share a scale in int4. Of 32, 64 and 128 it has the smallest error; they cost the same time."""

_INT4_ZERO = 8
_INT4_MAX = 15
_HALF_NORMAL = 2.0**-14
"""Smallest normal number of fp16."""


def quantize_channels(weight: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """int8 with one scale an output channel.

    Args:
        weight: (N, K) float32.
        largest: what the farthest value of a channel from 0 becomes; at most 127.

    Returns:
        Values (N, K) int8 in -largest..largest, and scales (N,) float32; weight is about ``values * scales[:, None]``.
    """
    scales = weight.abs().amax(dim=1) / largest
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    values = (weight / scales[:, None]).round_().clamp_(-largest, largest)
    return values.to(torch.int8), scales


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int4 with one scale for :data:`BLOCK` inputs of an output channel.

    The value of a block that is farthest from 0 becomes code 0, that is -8 scales, so that it is exact and that all 16
    codes are of use. Scales are numbers that fp16 can hold, unless one of a matrix is too small for it.

    Args:
        weight: (N, K) float32.

    Returns:
        Codes (N, ceil(K / BLOCK), BLOCK / 2) uint8, two a byte, the first in the low half; and scales
        (N, ceil(K / BLOCK)) float32. A weight is about ``(code - 8) * scale``. Padding at the end of K is 0.
    """
    padding = -weight.shape[1] % BLOCK
    padded = torch.nn.functional.pad(weight, (0, padding))
    blocks = padded.reshape(len(weight), -1, BLOCK)  # (N, K / BLOCK, BLOCK)
    extremes = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    scales = extremes / -_INT4_ZERO
    scales = torch.where(scales == 0, torch.full_like(scales, _HALF_NORMAL), scales)  # of a block of zeros
    if bool((scales.abs() >= _HALF_NORMAL).all()):
        scales = scales.half().float()
    codes = (blocks / scales).round_().add_(_INT4_ZERO).clamp_(0, _INT4_MAX).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales.squeeze(2)
