"""The Q-Former's first stage: image-text contrast (ITC), matching (ITM) and generation (ITG), as in the BLIP-2 paper.

One pass serves ITC's image side and ITG, since queries never see the text there. Negatives for ITM are drawn at random
first, then more and more by likeness. The vision encoder is frozen: its features come from a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizerFast, Blip2ForImageTextRetrieval

from . import data, qformer, scenes
from .tokens import DECODE_TOKEN
from .training import Recipe, Run

RECIPE = Recipe("stage_one", steps=600, batch=80, muon_lr=0.01, adam_lr=1e-3, warmup=0.04)
_MATCHED = 32  # images of a batch that ITM takes, each with a negative text, each text with a negative image
_EASY, _HARD = 0.15, 0.5  # negatives are random up to _EASY of the steps, and by likeness alone from _HARD on


@dataclass(frozen=True)
class Captions:
    """The captions of a split: token ids (N, T) with [CLS] first, True where there is a token, and a number that
    captions of the same words share (N,)."""

    ids: torch.Tensor
    present: torch.Tensor
    same: torch.Tensor


def captions_of(things: np.ndarray, tokenizer: BertTokenizerFast) -> Captions:
    texts = [scenes.caption_of(data.decode(codes)) for codes in things]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    same = torch.tensor([numbers[text] for text in texts])
    return Captions(encoded.input_ids, encoded.attention_mask.bool(), same)


class StageOne(nn.Module):
    """The retrieval model and what only training needs: ITG's output layer and ITC's temperature."""

    def __init__(self, model: Blip2ForImageTextRetrieval, tokenizer: BertTokenizerFast) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        model.vision_model.requires_grad_(False)
        width = model.config.qformer_config.hidden_size
        self.itg_head = nn.Linear(width, len(tokenizer))
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())
        self.decode_id = tokenizer.convert_tokens_to_ids(DECODE_TOKEN)
        self.queries = model.config.num_query_tokens

    def itc_and_itg(self, keys_values: qformer.KeysValues, texts: Captions) -> tuple[torch.Tensor, torch.Tensor]:
        """Image features (B, Q, E), normalised, and ITG's loss."""
        count = len(texts.ids)
        ids = texts.ids.clone()
        ids[:, 0] = self.decode_id
        query = self.model.query_tokens.expand(count, -1, -1)
        embeds = self.model.embeddings(input_ids=ids[:, :-1], query_embeds=query)
        hidden = qformer.forward(
            self.model.qformer, embeds, self.queries, itg_mask(self.queries, ids.shape[1] - 1), keys_values
        )
        image = F.normalize(self.model.vision_projection(hidden[:, : self.queries]), dim=-1)
        known = texts.present[:, 1:]
        logits = self.itg_head(hidden[:, self.queries :][known])
        return image, F.cross_entropy(logits, ids[:, 1:][known])

    def text_features(self, texts: Captions) -> torch.Tensor:
        """(B, E), normalised."""
        mask = texts.present[:, None, None, :]
        hidden = qformer.forward(self.model.qformer, self.model.embeddings(input_ids=texts.ids), 0, mask)
        return F.normalize(self.model.text_projection(hidden[:, 0]), dim=-1)

    def match(self, keys_values: qformer.KeysValues, ids: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """ITM logits (B, 2) of pairs."""
        query = self.model.query_tokens.expand(len(ids), -1, -1)
        embeds = self.model.embeddings(input_ids=ids, query_embeds=query)
        mask = F.pad(present, (self.queries, 0), value=True)[:, None, None, :]
        hidden = qformer.forward(self.model.qformer, embeds, self.queries, mask, keys_values)
        return self.model.itm_head(hidden[:, : self.queries]).mean(1)

    def similarities(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(images, texts): the best of an image's queries for each text."""
        return torch.einsum("iqe,te->itq", image, text).amax(-1)

    def losses(self, image: torch.Tensor, texts: Captions, hardness: float) -> tuple[torch.Tensor, dict[str, float]]:
        """The three losses of a batch of image features (B, P, D)."""
        keys_values = qformer.image_keys_values(self.model.qformer, image)
        image_features, itg = self.itc_and_itg(keys_values, texts)
        scores = self.similarities(image_features, self.text_features(texts)) / self.log_temperature.exp()
        same = texts.same[:, None] == texts.same[None, :]
        wanted = same / same.sum(1, keepdim=True)
        itc = (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted)) / 2
        itm, right = self._itm(keys_values, texts, scores.detach(), same, hardness)
        top = float(same.gather(1, scores.argmax(1, keepdim=True)).float().mean())
        parts = {"itc": itc, "itm": itm, "itg": itg}
        figures = {name: float(part.detach()) for name, part in parts.items()}
        return itc + itm + itg, {**figures, "itm_right": right, "r1": top}

    def _itm(
        self,
        keys_values: qformer.KeysValues,
        texts: Captions,
        scores: torch.Tensor,
        same: torch.Tensor,
        hardness: float,
    ) -> tuple[torch.Tensor, float]:
        few = torch.arange(min(_MATCHED, len(scores)))
        weights = (scores * hardness).masked_fill(same, float("-inf"))
        other_texts = torch.multinomial(weights[few].softmax(1), 1)[:, 0]
        other_images = torch.multinomial(weights.T[few].softmax(1), 1)[:, 0]
        images = torch.cat([few, few, other_images])
        rows = torch.cat([few, other_texts, few])
        logits = self.match(qformer.select(keys_values, images), texts.ids[rows], texts.present[rows])
        matched = (torch.arange(len(rows)) < len(few)).long()
        right = float((logits.argmax(1) == matched).float().mean())
        return F.cross_entropy(logits, matched), right


def itg_mask(queries: int, length: int) -> torch.Tensor:
    """(1, 1, T, T): queries see queries; a text token sees the queries, itself and the text before it."""
    total = queries + length
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[:queries, :queries] = True
    return mask[None, None]


def hardness(done: float) -> float:
    """How far likeness decides about ITM's negatives, for a part ``done`` of the steps."""
    return min(1.0, max(0.0, (done - _EASY) / (_HARD - _EASY)))


class Batches:
    """Rows of a batch: every other one of scenes that are alike (same number of objects, same leftmost colour or
    shape), where negatives are hard; the rest from anywhere."""

    def __init__(self, things: np.ndarray, size: int, groups: int = 4) -> None:
        self._count, self._size, self._groups = len(things), size, groups
        number = (things[:, :3, 0] != data.NONE).sum(1)
        keys = [number * 1000 + things[:, 0, part] for part in (1, 2)]
        self._alike = [np.flatnonzero(key == value) for key in keys for value in np.unique(key)]

    def __call__(self, step: int, rng: np.random.Generator) -> np.ndarray:
        if step % 2 == 0:
            return rng.choice(self._count, self._size, replace=False)
        chosen = rng.choice(len(self._alike), self._groups, replace=False)
        share = self._size // self._groups
        rows = [rng.choice(self._alike[group], min(share, len(self._alike[group])), replace=False) for group in chosen]
        return rng.permutation(np.unique(np.concatenate(rows)))


def train(
    work: Path,
    stage: StageOne,
    features: np.ndarray,
    things: np.ndarray,
    recipe: Recipe = RECIPE,
) -> StageOne:
    """Train ``stage`` on cached features (N, P, D) of scenes with ``things`` (N, 7, 3)."""
    captions = captions_of(things[: len(features)], stage.tokenizer)
    batches = Batches(things[: len(features)], recipe.batch)

    def loss(step: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        rows = np.sort(batches(step, rng))
        image = torch.from_numpy(features[rows]).float()
        picked = torch.from_numpy(rows)
        texts = Captions(captions.ids[picked], captions.present[picked], captions.same[picked])
        order = torch.randperm(len(rows))  # ITM takes the first few
        texts = Captions(texts.ids[order], texts.present[order], texts.same[order])
        return stage.losses(image[order], texts, hardness(step / recipe.steps))

    Run(work, recipe, stage, loss).train()
    return stage
