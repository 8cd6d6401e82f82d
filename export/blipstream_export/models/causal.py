"""What decoder-only language models share: one graph for prefill and decode step (see ``blipstream.contract``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class CausalDecoder(nn.Module):
    """A decoder-only language model with its KV cache as inputs and outputs.

    A subclass fills :attr:`layers` and says how tokens are embedded and how logits come about. Activations are flat,
    (B * S, C). A layer has two methods: ``attend(hidden, batch, key, value, seqlens_k, total_sequence_length)``, which
    is self-attention without its output projection and gives (B * S, H * D_head) and the layer's cache, and
    ``feed_forward(hidden, attended)``, the rest of the layer, which works on any rows of the activations.
    """

    layers: Any

    def embed(self, ids: Tensor, soft_tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (N, C) of the token ids (N,), which stand at the given positions (N,)."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of the last layer's output (N, C)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        soft_tokens: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run B rows of S tokens; shapes and meaning are those of the decoder's graph in ``blipstream.contract``.

        Args:
            input_ids: (B, S) int64; -(1 + k) stands for row k of ``soft_tokens``.
            soft_tokens: (N, D) float32.
            position_ids: (B, S) int64.
            last_index: (B,) int64, the token of each row whose logits are wanted.
            seqlens_k: (B,) int32.
            total_sequence_length: () int32.
            past: key and value (B, H, T, D_head) of each layer in turn.

        Returns:
            logits (B, V) float32, then the present key and value of each layer in turn.
        """
        batch, length = input_ids.shape
        hidden = self.embed(input_ids.reshape(-1), soft_tokens, position_ids.reshape(-1))  # (B * S, C)
        last_rows = torch.arange(batch) * length + last_index  # (B,)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            key, value = past[2 * index], past[2 * index + 1]
            attended, key, value = layer.attend(hidden, batch, key, value, seqlens_k, total_sequence_length)
            present += [key, value]
            if index == len(self.layers) - 1:  # behind the last attention, only the wanted tokens count
                hidden, attended = hidden.index_select(0, last_rows), attended.index_select(0, last_rows)
            hidden = layer.feed_forward(hidden, attended)
        return (self.logits(hidden), *present)
