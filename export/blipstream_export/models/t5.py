"""T5 for serving: an encoder that reads whole prompts, and a decoder that steps (see ``blipstream.contract``).

Versions 1.0 and 1.1 (Flan-T5 among them) differ in the feed-forward layer and in the scale of the logits; both follow
from the modules and the configuration of transformers (Raffel et al., 2020; Shazeer, "GLU variants", 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blipstream.contract import DECODER_FILE, ENCODER_FILE
from blipstream.errors import CheckpointError
from blipstream.manifest import DecoderSection, EncoderSection
from blipstream_export.graphs import Graph, encoder_inputs, stepping_decoder_inputs
from blipstream_export.models.layers import (
    RMSNorm,
    embed_tokens,
    fuse_linear,
    pad_head_columns,
    pad_head_rows,
    padded_head_dim,
)
from blipstream_export.ops import attention, cached_attention, cross_attention, distance_bias

_SCALE = 1.0
"""T5 does not scale its scores: its initialisation does."""


def decoder_start_token_id(config: Any) -> int | None:
    """The token from which ``generate`` starts an answer, if the configuration has one."""
    ids = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
    return next((token for token in ids if token is not None), None)


def check_config(config: Any, source: str) -> None:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    start = decoder_start_token_id(config)
    if start is None:
        raise CheckpointError(
            f"the language model of {source} has neither decoder_start_token_id nor bos_token_id, and one of them is "
            "what an answer begins with"
        )
    if not 0 <= start < config.vocab_size:
        raise CheckpointError(
            f"decoder_start_token_id = {start} of {source} is outside the language model's vocabulary of "
            f"{config.vocab_size} tokens"
        )


def max_positions(config: Any) -> None:
    """See :class:`~blipstream_export.families.LanguageModule`. Relative positions have no end."""
    del config


def decoder_section(config: Any, *, max_sequences: int, max_tokens: int) -> DecoderSection:
    """See :class:`~blipstream_export.families.LanguageModule`. A prompt and an answer have ``max_tokens`` each."""
    start = decoder_start_token_id(config)
    assert start is not None  # or check_config has refused it
    head_dim = padded_head_dim(config.d_kv)
    return DecoderSection(
        family=config.model_type,
        num_layers=config.num_decoder_layers,
        num_key_value_heads=config.num_heads,
        head_dim=head_dim,
        hidden_size=config.d_model,
        vocab_size=config.vocab_size,
        max_sequences=max_sequences,
        max_tokens=1 + max_tokens,
        encoder=EncoderSection(
            num_heads=config.num_heads, head_dim=head_dim, max_tokens=max_tokens, decoder_start_token_id=start
        ),
    )


def graphs(model: Any, sizes: DecoderSection) -> Iterator[Graph]:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    tables = ("embed_tokens.weight",) if tied else ()
    yield Graph(ENCODER_FILE, T5Encoder(model), encoder_inputs(sizes), head_tables=tables)
    yield Graph(DECODER_FILE, T5Decoder(model), stepping_decoder_inputs(sizes))


class T5Encoder(nn.Module):
    """The encoder of ``T5ForConditionalGeneration``, and what each layer of the decoder makes of its output.

    Args:
        source: the model of transformers; parameters are shared where their layout stays.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        encoder, heads = source.encoder, source.encoder.block[0].layer[0].SelfAttention
        self.embed_tokens = encoder.embed_tokens
        self.max_distance = int(heads.relative_attention_max_distance)
        self.bias = _bias_table(heads, torch.arange(-self.max_distance, self.max_distance + 1))  # (2 M + 1, H)
        self.layers: Any = nn.ModuleList()
        for block in encoder.block:
            self.layers.append(_EncoderLayer(block))
        self.final_norm = RMSNorm(encoder.final_layer_norm)
        self.cross: Any = nn.ModuleList()
        for block in source.decoder.block:
            heads = block.layer[1].EncDecAttention
            self.cross.append(_CrossKeyValue(heads))

    def forward(self, input_ids: Tensor, soft_tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Read B prompts of S tokens; shapes are those of the encoder's graph in ``blipstream.contract``.

        Args:
            input_ids: (B, S) int64; -(1 + k) stands for row k of ``soft_tokens``.
            soft_tokens: (N, D) float32.
            lengths: (B,) int32.

        Returns:
            key and value (B, H, S, D_head) of each layer of the decoder in turn.
        """
        batch, length = input_ids.shape
        hidden = embed_tokens(input_ids.reshape(-1), soft_tokens, self.embed_tokens)  # (B * S, C)
        mask = (torch.arange(length) < lengths[:, None]).int()  # (B, S)
        bias = self._bias(length)
        for layer in self.layers:
            hidden = layer(hidden, batch, mask, bias)
        hidden = self.final_norm(hidden)
        return tuple(x for cross in self.cross for x in cross(hidden, batch))

    def _bias(self, length: int) -> Tensor:
        """What each query adds to its scores, by the distance of the key: (1, H, S, S)."""
        positions = torch.arange(length)
        distances = (positions[None, :] - positions[:, None]).clamp(-self.max_distance, self.max_distance)  # (S, S)
        table = self.bias.index_select(0, (distances + self.max_distance).reshape(-1))
        return table.reshape(1, length, length, -1).permute(0, 3, 1, 2)


class T5Decoder(nn.Module):
    """The decoder of ``T5ForConditionalGeneration``, one token a row, with both caches as inputs and outputs.

    Args:
        source: the model of transformers; parameters are shared where their layout stays.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        decoder, heads = source.decoder, source.decoder.block[0].layer[0].SelfAttention
        self.embed_tokens = decoder.embed_tokens
        distances = torch.arange(int(heads.relative_attention_max_distance) + 1)
        self.bias = _bias_table(heads, -distances)  # (M + 1, H)
        self.layers: Any = nn.ModuleList()
        for block in decoder.block:
            self.layers.append(_DecoderLayer(block))
        self.final_norm = RMSNorm(decoder.final_layer_norm)
        self.logits_scale = source.model_dim**-0.5 if source.config.scale_decoder_outputs else None
        tied = source.lm_head.weight is self.embed_tokens.weight
        self.lm_head = None if tied else source.lm_head  # one name for a tied tensor, so that nothing holds another

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        cross_seqlens_k: Tensor,
        cross_total_sequence_length: Tensor,
        past: Sequence[Tensor],
        past_cross: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run B rows of one token; shapes are those of the stepping decoder's graph in ``blipstream.contract``.

        Args:
            input_ids: (B, 1) int64.
            position_ids: (B, 1) int64.
            seqlens_k: (B,) int32.
            total_sequence_length: () int32.
            cross_seqlens_k: (B,) int32.
            cross_total_sequence_length: () int32.
            past: key and value (B, H, T, D_head) of each layer in turn.
            past_cross: the same (B, H, T_prompt, D_head) of the cross-attention.

        Returns:
            logits (B, V) float32; the present key and value of each layer in turn; the same of the cross-attention.
        """
        hidden = self.embed_tokens(input_ids.reshape(-1))  # (B, C)
        bias = distance_bias(self.bias, position_ids, total_sequence_length, past[0])  # (B, H, 1, L)
        present: list[Tensor] = []
        present_cross: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            pair = slice(2 * index, 2 * index + 2)
            hidden, cache = layer.attend(hidden, past[pair], seqlens_k, total_sequence_length, bias)
            hidden, cross = layer.read(hidden, past_cross[pair], cross_seqlens_k, cross_total_sequence_length)
            hidden = layer.feed_forward(hidden)
            present += cache
            present_cross += cross
        return (self._logits(hidden), *present, *present_cross)

    def _logits(self, hidden: Tensor) -> Tensor:
        hidden = self.final_norm(hidden)
        if self.logits_scale is not None:
            hidden = hidden * self.logits_scale
        return nn.functional.linear(hidden, (self.lm_head or self.embed_tokens).weight)


class _EncoderLayer(nn.Module):
    """Self-attention and feed-forward, both pre-norm, on flat activations (B * S, C)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.attention = _SelfAttention(source.layer[0])
        self.feed_forward = _FeedForward(source.layer[1])

    def forward(self, hidden: Tensor, batch: int, mask: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.attention.project(hidden, batch).chunk(3, dim=-1)  # (B, S, H * D_head) each
        attended = attention(query, key, value, self.attention.num_heads, _SCALE, mask, bias)
        return self.feed_forward(hidden + self.attention.out_proj(attended.flatten(0, 1)))


class _DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, all pre-norm, on one token a row, (B, C)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.attention = _SelfAttention(source.layer[0])
        self.cross_norm = RMSNorm(source.layer[1].layer_norm)
        heads = source.layer[1].EncDecAttention
        head_dim, padded = heads.key_value_proj_dim, padded_head_dim(heads.key_value_proj_dim)
        self.query = pad_head_rows(heads.q, head_dim, padded)
        self.cross_out_proj = pad_head_columns(heads.o, head_dim, padded)
        self.feed_forward = _FeedForward(source.layer[2])

    def attend(
        self,
        hidden: Tensor,
        cache: Sequence[Tensor],
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Self-attention: the hidden states behind it, and the layer's cache."""
        own = self.attention
        qkv, heads = own.project(hidden, hidden.shape[0]), own.num_heads
        attended, *present = cached_attention(
            qkv, *cache, seqlens_k, total_sequence_length, heads, heads, _SCALE, bias=bias
        )
        return hidden + own.out_proj(attended.flatten(0, 1)), present

    def read(
        self, hidden: Tensor, cache: Sequence[Tensor], seqlens_k: Tensor, total_sequence_length: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Cross-attention to what the encoder gave: the hidden states behind it, and its cache."""
        query = self.query(self.cross_norm(hidden)).unsqueeze(1)  # (B, 1, H * D_head)
        attended, *present = cross_attention(query, *cache, seqlens_k, total_sequence_length, _SCALE)
        return hidden + self.cross_out_proj(attended.flatten(0, 1)), present


class _SelfAttention(nn.Module):
    """Norm and projections of a self-attention; whoever owns it attends."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        heads = source.SelfAttention
        self.num_heads = int(heads.n_heads)
        head_dim, padded = heads.key_value_proj_dim, padded_head_dim(heads.key_value_proj_dim)
        self.norm = RMSNorm(source.layer_norm)
        self.qkv = fuse_linear([pad_head_rows(part, head_dim, padded) for part in (heads.q, heads.k, heads.v)])
        self.out_proj = pad_head_columns(heads.o, head_dim, padded)

    def project(self, hidden: Tensor, batch: int) -> Tensor:
        """Queries, keys and values (B, S, 3 * H * D_head) of hidden states (B * S, C)."""
        return self.qkv(self.norm(hidden)).reshape(batch, -1, self.qkv.out_features)


class _CrossKeyValue(nn.Module):
    """What one layer of the decoder reads of the encoder: keys and values (B, H, S, D_head)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = int(source.n_heads), padded_head_dim(source.key_value_proj_dim)
        parts = [pad_head_rows(part, source.key_value_proj_dim, self.head_dim) for part in (source.k, source.v)]
        self.key_value = fuse_linear(parts)

    def forward(self, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        heads = self.key_value(hidden).reshape(batch, -1, 2 * self.num_heads, self.head_dim).transpose(1, 2)
        key, value = heads.chunk(2, dim=1)
        return key, value


class _FeedForward(nn.Module):
    """Feed-forward, plain or gated, with its norm and residual.

    ``wo`` has a type of its own: transformers keeps it in fp32 where the other weights are halves, and from the first
    of them on the residual stream is fp32 as well.
    """

    float32_in_fp16 = ("wo",)

    def __init__(self, source: Any) -> None:
        super().__init__()
        layer = source.DenseReluDense
        self.norm = RMSNorm(source.layer_norm)
        self.gated = hasattr(layer, "wi_0")
        self.wi = fuse_linear([layer.wi_0, layer.wi_1]) if self.gated else layer.wi
        self.activation, self.wo = layer.act, layer.wo

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.wi(self.norm(hidden))
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        return hidden + self.wo(inner.to(self.wo.weight.dtype))


def _bias_table(heads: Any, distances: Tensor) -> nn.Parameter:
    """The learned bias (R, H) of each of the distances (R,) from query to key, by the model's own buckets."""
    with torch.no_grad():
        buckets = heads._relative_position_bucket(
            distances,
            bidirectional=not heads.is_decoder,
            num_buckets=heads.relative_attention_num_buckets,
            max_distance=heads.relative_attention_max_distance,
        )
        return nn.Parameter(heads.relative_attention_bias(buckets), requires_grad=False)
