"""The Q-Former's forward pass on the library's weights, arranged for training.

The same function as Blip2QFormerModel and InstructBlipQFormerModel (tests compare them), but the keys and values of an
image are computed once and shared by every pass that reads the image.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import Blip2QFormerModel, InstructBlipQFormerModel

KeysValues = list[tuple[torch.Tensor, torch.Tensor] | None]
QFormer = Blip2QFormerModel | InstructBlipQFormerModel


def image_keys_values(qformer: QFormer, image: torch.Tensor) -> KeysValues:
    """Per layer, keys and values (B, H, P, d) of image features (B, P, D); None for a layer without
    cross-attention."""
    found: KeysValues = []
    for layer in qformer.encoder.layer:
        if not layer.has_cross_attention:
            found.append(None)
            continue
        attention = layer.crossattention.attention
        heads = attention.num_attention_heads
        found.append((_split(attention.key(image), heads), _split(attention.value(image), heads)))
    return found


def select(keys_values: KeysValues, rows: torch.Tensor) -> KeysValues:
    """The keys and values of the images ``rows`` (a 1-D index)."""
    return [pair and (pair[0][rows], pair[1][rows]) for pair in keys_values]


def forward(
    qformer: Blip2QFormerModel,
    embeds: torch.Tensor,
    queries: int,
    mask: torch.Tensor | None = None,
    keys_values: KeysValues | None = None,
) -> torch.Tensor:
    """Hidden states (B, T, D) for embeddings (B, T, D) whose first ``queries`` are query tokens.

    ``mask`` (B or 1, 1, T or 1, T) is True where a token sees another; ``keys_values`` are needed if there are queries.
    """
    return encode(qformer, qformer.layernorm(embeds), queries, mask, keys_values)


def encode(
    qformer: QFormer,
    hidden: torch.Tensor,
    queries: int,
    mask: torch.Tensor | None = None,
    keys_values: KeysValues | None = None,
) -> torch.Tensor:
    """As :func:`forward`, from embeddings that are normalised already."""
    for i, layer in enumerate(qformer.encoder.layer):
        hidden = _attend(layer.attention, hidden, None, mask)
        parts = []
        if queries:
            asking = hidden[:, :queries]
            if layer.has_cross_attention:
                assert keys_values is not None, "query tokens need an image"
                asking = _attend(layer.crossattention, asking, keys_values[i], None)
            parts.append(layer.feed_forward_chunk_query(asking))
        if hidden.shape[1] > queries:
            parts.append(layer.feed_forward_chunk(hidden[:, queries:]))
        hidden = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return hidden


def _attend(
    block: torch.nn.Module,
    hidden: torch.Tensor,
    keys_values: tuple[torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    attention = block.attention
    heads = attention.num_attention_heads
    keys, values = keys_values or (_split(attention.key(hidden), heads), _split(attention.value(hidden), heads))
    context = F.scaled_dot_product_attention(_split(attention.query(hidden), heads), keys, values, attn_mask=mask)
    return block.output(context.transpose(1, 2).flatten(2), hidden)


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, H * d) -> (B, H, T, d)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)
