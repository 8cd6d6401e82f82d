"""How a language model reads soft tokens and texts in training: packed behind one prefix (decoder-only), or one text
in a row (encoder-decoder). Both give the same: the logits of every token that is to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from .text import Text


@dataclass(frozen=True)
class Predictions:
    """Logits (K, V) of the tokens to predict, these tokens (K,), and the text (K,) that each belongs to, numbered in
    the order given."""

    logits: torch.Tensor
    labels: torch.Tensor
    texts: torch.Tensor

    def right(self) -> torch.Tensor:
        """For each text, whether its every token is the likeliest one: (texts,) bool."""
        wrong = self.logits.argmax(-1) != self.labels
        right = torch.ones(int(self.texts.max()) + 1, dtype=torch.bool)
        right[self.texts[wrong]] = False
        return right


class Reader(Protocol):
    """Reads rows of texts; the texts of a row are about one image, whose soft tokens are the row's prefix."""

    def pack(self, rows: list[list[Text]]) -> Any:
        """A batch for :meth:`predict`."""

    def predict(self, model: nn.Module, prefix: torch.Tensor, batch: Any) -> Predictions:
        """What ``model`` makes of a batch behind soft tokens ``prefix`` (rows, Q, D)."""


class _Encoder:
    """Token ids of texts, remembered."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}
        self.pad, self.end = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)

    def __call__(self, text: str) -> list[int]:
        """Token ids as the tokenizer's template has them."""
        if text not in self._ids:
            self._ids[text] = self._tokenizer(text).input_ids
        return self._ids[text]


# --- decoder-only ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Texts behind a prefix: token ids (B, L), labels (B, L) with -100 where nothing is predicted, the text (B, L) that
    each belongs to, positions (B, prefix + L), and the attention mask (B, 1, prefix + L, prefix + L), True where a
    query (second last axis) sees a key."""

    ids: torch.Tensor
    labels: torch.Tensor
    texts: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


class PackedReader:
    """Packs several texts of one image behind one prefix, so that the prefix is computed once.

    Every text sees the prefix and itself; its positions go on from the prefix, as they do for a text of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prefix: int) -> None:
        self.prefix = prefix
        self.encode = _Encoder(tokenizer)

    def pack(self, rows: list[list[Text]]) -> Packed:
        # without the end token; and how many are given rather than predicted
        encoded = [[(self.encode(text.whole), len(self.encode(text.prompt))) for text in row] for row in rows]
        length = max(sum(len(ids) for ids, _ in row) for row in encoded)
        shape = (len(rows), length)
        ids, labels = np.full(shape, self.encode.pad), np.full(shape, -100)
        positions, texts = np.zeros(shape, np.int64), np.full(shape, -1)
        text = 0
        for i, row in enumerate(encoded):
            start = 0
            for tokens, known in row:
                stop = start + len(tokens)
                ids[i, start:stop] = tokens
                labels[i, start + known - 1 : stop] = [*tokens[known:], self.encode.end]
                positions[i, start:stop] = self.prefix + np.arange(len(tokens))
                texts[i, start:stop] = text
                start, text = stop, text + 1
        before = np.broadcast_to(np.arange(self.prefix), (len(rows), self.prefix))
        all_positions = np.concatenate([before, positions], 1)
        return Packed(*(torch.from_numpy(array) for array in (ids, labels, texts, all_positions, self._mask(texts))))

    def _mask(self, texts: np.ndarray) -> np.ndarray:
        count, length = texts.shape
        total = self.prefix + length
        mask = np.zeros((count, 1, total, total), bool)
        mask[:, 0, :, : self.prefix] = True
        mask[:, 0, self.prefix :, self.prefix :] = texts[:, :, None] == texts[:, None, :]
        return mask & np.tri(total, dtype=bool)

    def predict(self, model: nn.Module, prefix: torch.Tensor, batch: Packed) -> Predictions:
        embeds = torch.cat([prefix, model.get_input_embeddings()(batch.ids)], 1)
        hidden = model.model(
            inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        known = batch.labels != -100
        logits = model.lm_head(hidden[:, self.prefix :][known])
        return Predictions(logits, batch.labels[known], batch.texts[known])


# --- encoder-decoder ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Texts of about the same length: the row (N,) and the number (N,) of each, the prompt's token ids (N, S) with a
    mask (N, S), what the decoder is given (N, T), and labels (N, T), -100 where nothing is predicted."""

    rows: torch.Tensor
    texts: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    given: torch.Tensor
    labels: torch.Tensor


class PairReader:
    """Gives each text a row of its own: an encoder that looks both ways mixes prefix and prompt, so they share nothing.

    Captions and answers are padded apart, as captions are long and have short prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, start: int) -> None:
        self.encode = _Encoder(tokenizer)
        self._start = start  # what the decoder is given first

    def pack(self, rows: list[list[Text]]) -> list[Pairs]:
        numbered = [(row, text) for row, texts in enumerate(rows) for text in texts]
        groups = ([], [])
        for number, (row, text) in enumerate(numbered):
            groups[text.kind == "caption"].append((row, number, text))
        return [self._pairs(group) for group in groups if group]

    def _pairs(self, group: list[tuple[int, int, Text]]) -> Pairs:
        prompts = [self.encode(text.prompt) for _, _, text in group]
        targets = [self.encode(text.target) for _, _, text in group]
        ids, labels = _padded(prompts, self.encode.pad), _padded(targets, -100)
        mask = _padded([[1] * len(prompt) for prompt in prompts], 0)
        given = np.full_like(labels, self._start)
        given[:, 1:] = np.where(labels[:, :-1] == -100, self.encode.pad, labels[:, :-1])
        rows, texts = (np.array([entry[i] for entry in group]) for i in (0, 1))
        return Pairs(*(torch.from_numpy(array) for array in (rows, texts, ids, mask, given, labels)))

    def predict(self, model: nn.Module, prefix: torch.Tensor, batch: list[Pairs]) -> Predictions:
        parts = [self._predict(model, prefix, pairs) for pairs in batch]
        return Predictions(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.texts for part in parts]),
        )

    def _predict(self, model: nn.Module, prefix: torch.Tensor, pairs: Pairs) -> Predictions:
        embeds = torch.cat([prefix[pairs.rows], model.get_input_embeddings()(pairs.ids)], 1)
        mask = nn.functional.pad(pairs.mask, (prefix.shape[1], 0), value=1)
        logits = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=pairs.given, use_cache=False).logits
        known = pairs.labels != -100
        return Predictions(logits[known], pairs.labels[known], pairs.texts[:, None].expand_as(known)[known])


def _padded(rows: list[list[int]], filler: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), filler)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
