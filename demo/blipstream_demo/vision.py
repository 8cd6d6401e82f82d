"""The vision encoder's own pre-training: each patch tells what it shows, the class token the whole scene."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from . import data, scenes
from .training import Recipe, Run

SIDES = (len(scenes.SIZES), len(scenes.COLOURS), len(scenes.SHAPES))
RECIPE = Recipe("vision", steps=2900, batch=40)


def config(layers: int = 4, patch: int = 12) -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=3,
        image_size=scenes.IMAGE_SIZE,
        patch_size=patch,
        initializer_range=0.02,
    )


def pixel_values(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> normalised (B, 3, H, W) fp32, as BlipImageProcessor does without resizing."""
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)).div_(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return pixels.sub_(mean).div_(std)


def initialise(model: Blip2VisionModel) -> None:
    """Start from positions of sines and cosines, and from queries equal to keys (attention by likeness): a small ViT
    leaves its plateau much earlier than from noise (compare mimetic initialisation, Trockman and Kolter, 2023)."""
    width, patch = model.config.hidden_size, int(model.config.patch_size)
    side = int(model.config.image_size) // patch
    frequencies = torch.logspace(math.log10(0.25), math.log10(side / 2), width // 4)
    angles = torch.arange(side)[:, None] / side * 2 * math.pi * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    grid = torch.cat([waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], -1)
    with torch.no_grad():
        model.embeddings.position_embedding[0, 1:] = 0.5 * grid.reshape(side * side, width)
        for layer in model.encoder.layers:
            weight = layer.self_attn.qkv.weight
            weight.normal_(0, 0.7 * width**-0.5)
            weight[width : 2 * width] = weight[:width]


class VisionPretraining(nn.Module):
    """The encoder with linear heads that are thrown away afterwards."""

    def __init__(self, vision_config: Blip2VisionConfig) -> None:
        super().__init__()
        self.encoder = Blip2VisionModel(vision_config)
        initialise(self.encoder)
        width = vision_config.hidden_size
        self.patch_head = nn.Linear(width, 6 + sum(SIDES))  # is there an object, its place, offset, attributes
        self.scene_head = nn.Linear(width, 3 * (1 + sum(SIDES)))  # for each place: is it taken, attributes

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(pixel_values=pixels).last_hidden_state  # (B, 1 + P, D)
        return self.patch_head(hidden[:, 1:]), self.scene_head(hidden[:, 0]).view(len(pixels), 3, -1)


def patch_labels(labels: np.ndarray, things: np.ndarray, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 24, 24) and (B, 7, 3) -> the object that covers most of each patch (B, P) int64, 0 where none covers a
    quarter, and its attributes (B, P, 3) int64."""
    count, step = len(labels), 24 // patches
    cells = labels.reshape(count, patches, step, patches, step).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(count, patches * patches, step * step)
    cover = np.stack([(cells == place).sum(-1) for place in range(1, data.PLACES + 1)], -1)
    place = np.where(cover.max(-1) * 4 >= step * step, cover.argmax(-1) + 1, 0)
    padded = np.concatenate([np.zeros_like(things[:, :1]), things], 1)
    attributes = padded[np.arange(count)[:, None], place]
    return torch.from_numpy(place), torch.from_numpy(attributes.astype(np.int64))


def centre_offsets(labels: np.ndarray, place: np.ndarray) -> torch.Tensor:
    """From each patch to the middle of what is seen of its object: (B, P, 2) fp32, in sides of the image."""
    count, patches = len(labels), int(place.shape[1] ** 0.5)
    middles = np.zeros((count, data.PLACES + 1, 2), np.float32)
    ys, xs = np.mgrid[:24, :24] / 24
    for i in range(1, data.PLACES + 1):
        mask = labels == i
        total = np.maximum(mask.sum((1, 2)), 1)
        middles[:, i, 0], middles[:, i, 1] = (mask * xs).sum((1, 2)) / total, (mask * ys).sum((1, 2)) / total
    centres = (np.arange(patches) + 0.5) / patches
    grid = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)
    offsets = middles[np.arange(count)[:, None], place] - grid
    return torch.from_numpy(offsets.astype(np.float32))


@dataclass(frozen=True)
class Batch:
    """Images (B, H, W, 3), labels (B, 24, 24), things (B, 7, 3), all uint8; the first ``crowds`` rows are crowds."""

    images: np.ndarray
    labels: np.ndarray
    things: np.ndarray
    crowds: int


def losses(model: VisionPretraining, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a batch, and how often a patch tells the shape and the class token the scene's shapes."""
    patch_logits, scene_logits = model(pixel_values(batch.images))
    patches = int(patch_logits.shape[1] ** 0.5)
    place, attributes = patch_labels(batch.labels, batch.things, patches)
    seen = place > 0
    loss = F.binary_cross_entropy_with_logits(patch_logits[..., 0], seen.float())
    offsets = centre_offsets(batch.labels, place.numpy())
    loss = loss + 2 * F.smooth_l1_loss(0.2 * patch_logits[..., 4:6][seen], offsets[seen], beta=0.02)
    attribute_loss, right = _attribute_losses(patch_logits[seen][:, 6:], attributes[seen])
    ordered, in_order = patch_logits[batch.crowds :], seen[batch.crowds :]
    place_loss = F.cross_entropy(ordered[..., 1:4][in_order], place[batch.crowds :][in_order] - 1)
    scene_loss, scene_right = _scene_losses(scene_logits[batch.crowds :], batch.things[batch.crowds :, :3])
    figures = {"shape": right[2], "scene_shape": scene_right[2]}
    return loss + attribute_loss + 0.5 * place_loss + 0.3 * scene_loss, figures


def _scene_losses(logits: torch.Tensor, things: np.ndarray) -> tuple[torch.Tensor, list[float]]:
    target = torch.from_numpy(things.astype(np.int64))
    taken = target[..., 0] != data.NONE
    loss = F.binary_cross_entropy_with_logits(logits[..., 0], taken.float())
    scene_loss, right = _attribute_losses(logits[taken][:, 1:], target[taken])
    return loss + scene_loss, right


def _attribute_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    loss, right = torch.zeros(()), []
    for part, target in zip(logits.split(SIDES, -1), targets.unbind(-1), strict=True):
        loss = loss + F.cross_entropy(part, target)
        right.append(float((part.argmax(-1) == target).float().mean()))
    return loss, right


def draw_batch(ordered: data.Split, crowd: data.Split, recipe: Recipe, step: int, rng: np.random.Generator) -> Batch:
    """Three crowds to two scenes, taken in turn; crowds have no order, so they may be mirrored."""
    crowds = recipe.batch * 3 // 5
    rows = np.arange(step * crowds, (step + 1) * crowds) % len(crowd.things)
    others = recipe.batch - crowds
    other_rows = np.arange(step * others, (step + 1) * others) % len(ordered.things)
    images, labels = crowd.images[rows], crowd.labels[rows]
    mirrored = rng.random(crowds) < 0.5
    images[mirrored], labels[mirrored] = images[mirrored, :, ::-1], labels[mirrored, :, ::-1]
    return Batch(
        np.concatenate([images, ordered.images[other_rows]]),
        np.concatenate([labels, ordered.labels[other_rows]]),
        np.concatenate([crowd.things[rows], ordered.things[other_rows]]),
        crowds,
    )


def train(work: Path, recipe: Recipe = RECIPE, vision_config: Blip2VisionConfig | None = None) -> VisionPretraining:
    """Train on ``work``/crowd and ``work``/train, which :func:`data.render_split` has rendered."""
    torch.manual_seed(recipe.seed)
    model = VisionPretraining(vision_config or config())
    ordered, crowd = data.open_split(work / "train"), data.open_split(work / "crowd")

    def loss(step: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return losses(model, draw_batch(ordered, crowd, recipe, step, rng))

    Run(work, recipe, model, loss).train()
    return model


@torch.inference_mode()
def accuracy(model: VisionPretraining, split: data.Split) -> dict[str, float]:
    """On a split of ordered scenes: the shape as patches tell it, and all that the class token tells."""
    right, small, patch_right, patch_small, whole = [], [], [], [], []
    for first in range(0, len(split.things), 200):
        rows = np.arange(first, min(first + 200, len(split.things)))
        things = torch.from_numpy(split.things[rows, :3].astype(np.int64))
        patch_logits, scene_logits = model(pixel_values(split.images[rows]))
        taken = things[..., 0] != data.NONE
        match = torch.stack([p.argmax(-1) for p in scene_logits[..., 1:].split(SIDES, -1)], -1) == things
        right.append(match[taken])
        small.append(things[taken][:, 0] == 0)
        whole.append((match.all(-1) | ~taken).all(-1) & ((scene_logits[..., 0] > 0) == taken).all(-1))
        place, attributes = patch_labels(split.labels[rows], split.things[rows], int(patch_logits.shape[1] ** 0.5))
        patch_right.append((patch_logits[..., 16:].argmax(-1) == attributes[..., 2])[place > 0])
        patch_small.append((attributes[..., 0] == 0)[place > 0])
    all_right, is_small = torch.cat(right).float(), torch.cat(small)
    patches, of_small = torch.cat(patch_right).float(), torch.cat(patch_small)
    size, colour, shape = all_right.mean(0).tolist()
    figures = {"size": size, "colour": colour, "shape": shape, "scene": float(torch.cat(whole).float().mean())}
    figures["shape_small"], figures["shape_large"] = (float(all_right[m][:, 2].mean()) for m in (is_small, ~is_small))
    figures["patch_small"], figures["patch_large"] = (float(patches[m].mean()) for m in (of_small, ~of_small))
    return figures
