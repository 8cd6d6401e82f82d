"""LAVIS's two vision encoders as parts of a checkpoint: EVA ViT (``eva_vit_g``) and OpenAI's CLIP ViT (``clip_vit_L``).

Both give the output of a block before the last, without the ViT's own final norm; ``ln_vision``, which was trained with
the Q-Former, normalises it. Sizes are read from the tensors. What no tensor tells is LAVIS's: the size of a head, the
epsilon of the norms, the activation, and how many blocks are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream_export.lavis.parts import Part

LN_VISION_EPS = 1e-5
"""Epsilon of ``ln_vision``, torch's default (``lavis/models/blip2_models/blip2.py``); transformers has one epsilon for
the whole of its ViT, and none for this norm."""


@dataclass(frozen=True)
class VitKind:
    """What LAVIS knows of a kind of ViT, and how the file names its tensors."""

    name: str
    patch: str
    """The patch convolution's weight (C, 3, patch, patch), by which the kind is known."""
    class_token: str
    positions: str
    blocks: str
    """What stands before a block's number."""
    layers: Mapping[str, str]
    """Linear layers and norms of a block, weight and bias each, by their names here and in transformers."""
    qkv: str
    fc1: str
    pre_norm: str | None
    head_dim: int
    activation: str
    eps: float
    lavis_depth: int
    """Blocks that LAVIS builds, whatever the file holds."""
    align_corners: bool
    """How LAVIS interpolates the position embeddings."""


EVA = VitKind(
    name="EVA ViT",
    patch="patch_embed.proj.weight",
    class_token="cls_token",
    positions="pos_embed",
    blocks="blocks.",
    layers={
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.projection",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    qkv="attn.qkv.weight",
    fc1="mlp.fc1.weight",
    pre_norm=None,
    head_dim=88,
    activation="gelu",
    eps=1e-6,
    lavis_depth=39,
    align_corners=False,
)

CLIP = VitKind(
    name="CLIP ViT",
    patch="conv1.weight",
    class_token="class_embedding",
    positions="positional_embedding",
    blocks="transformer.resblocks.",
    layers={
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.projection",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    qkv="attn.in_proj_weight",
    fc1="mlp.c_fc.weight",
    pre_norm="ln_pre",
    head_dim=64,
    activation="quick_gelu",
    eps=1e-5,
    lavis_depth=23,
    align_corners=True,
)

KINDS = (EVA, CLIP)


@dataclass(frozen=True)
class Vit:
    """A ViT as read: its configuration and its tensors, by the names that they have in ``Blip2VisionModel``."""

    kind: VitKind
    config: dict[str, Any]
    """Fields of ``Blip2VisionConfig``."""
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def find_kind(part: Part) -> VitKind:
    """The kind of a ViT, by the name of its patch convolution.

    Raises:
        UnsupportedCheckpointError: it is of neither kind.
    """
    names = part.names()
    found = [kind for kind in KINDS if kind.patch in names]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{kind.patch} ({kind.name})" for kind in KINDS)
    raise UnsupportedCheckpointError(
        f"{part.origin} is of a kind that Blipstream does not compose: one of {known} was expected, and it has "
        f"{'both' if found else 'neither'}"
    )


def read_vit(part: Part, *, image_size: int | None, layers: int | None, carried: int) -> Vit:
    """Read a ViT.

    Args:
        part: where its tensors are.
        image_size: pixels; by default what the position embeddings are for.
        layers: blocks to keep; by default ``carried`` or LAVIS's own number.
        carried: blocks that the trained part itself holds, 0 if none.

    Raises:
        CheckpointError: tensors are missing or contradict each other, or the sizes asked for do not fit them.
    """
    kind = find_kind(part)
    width, _, patch, _ = part.shape(kind.patch, "width, 3, patch, patch")
    count = part.count(kind.blocks)
    depth, reason = _depth(kind, part, count, layers, carried)
    inner = part.shape(f"{kind.blocks}0.{kind.fc1}", "inner width, width")[0]
    if width % kind.head_dim:
        raise UnsupportedCheckpointError(
            f"{part.origin} is {width} wide, no multiple of {kind.head_dim}, which is the size of a head in LAVIS's "
            f"{kind.name} and told by no tensor"
        )
    tensors, size, notes = _embeddings(kind, part, width, patch, image_size)
    for index in range(depth):
        tensors |= _block(kind, part, index, width, inner)
    part.check()
    notes.insert(0, f"{depth} of the {count} blocks of the {kind.name} are kept ({reason})")
    config = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": width // kind.head_dim,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": kind.activation,
        "layer_norm_eps": kind.eps,
        "qkv_bias": True,
    }
    return Vit(kind, config, tensors, tuple(notes))


def _depth(kind: VitKind, part: Part, count: int, asked: int | None, carried: int) -> tuple[int, str]:
    if asked is not None:
        if not 1 <= asked <= count:
            raise CheckpointError(f"--vision-layers {asked} was given, and {part.origin} has {count} blocks")
        return asked, "as --vision-layers says"
    if carried:
        return carried, "as many as the trained part holds"
    if count < kind.lavis_depth:
        raise CheckpointError(
            f"{part.origin} has {count} blocks, fewer than the {kind.lavis_depth} that LAVIS keeps of its {kind.name}: "
            "say with --vision-layers how many are kept"
        )
    return kind.lavis_depth, f"LAVIS's number for its {kind.name}"


def _embeddings(
    kind: VitKind, part: Part, width: int, patch: int, asked: int | None
) -> tuple[dict[str, Tensor], int, list[str]]:
    """Everything before the first block, the image's size in pixels, and a note if positions were interpolated."""
    tensors = {"embeddings.patch_embedding.weight": part.take(kind.patch, width, 3, patch, patch)}
    if kind.pre_norm is None:
        tensors["embeddings.patch_embedding.bias"] = part.take(kind.patch.replace("weight", "bias"), width)
        class_token = part.take(kind.class_token, 1, 1, width)
        rows = part.shape(kind.positions, "1, 1 + patches, width")[1]
        positions = part.take(kind.positions, 1, rows, width)
    else:
        for field in ("weight", "bias"):
            tensors[f"embeddings.pre_norm.{field}"] = part.take(f"{kind.pre_norm}.{field}", width)
        class_token = part.take(kind.class_token, width)[None, None]
        rows = part.shape(kind.positions, "1 + patches, width")[0]
        positions = part.take(kind.positions, rows, width)[None]
    side = math.isqrt(rows - 1)
    if side < 1 or side * side != rows - 1:
        raise CheckpointError(f"{part.origin} has {rows} position embeddings, and 1 more than a square was expected")
    size = side * patch if asked is None else asked
    if size < patch:
        raise CheckpointError(f"--image-size {size} was given, and one patch of {part.origin} has {patch} pixels")
    notes = []
    if size // patch != side:
        new = size // patch
        positions = interpolate_positions(positions, new, align_corners=kind.align_corners)
        notes.append(f"its position embeddings are interpolated from {side} x {side} to {new} x {new} patches")
    tensors |= {"embeddings.class_embedding": class_token, "embeddings.position_embedding": positions}
    return tensors, size, notes


def interpolate_positions(positions: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Position embeddings (1, 1 + P, C) for ``side`` x ``side`` patches: bicubic, the class token's as it is.

    LAVIS aligns the corners for its CLIP ViT and does not for its EVA ViT (``interpolate_pos_embed`` in each module).
    """
    first, patches = positions[:, :1].float(), positions[:, 1:].float()
    old = math.isqrt(patches.shape[1])
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, C, old, old)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=align_corners)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _block(kind: VitKind, part: Part, index: int, width: int, inner: int) -> dict[str, Tensor]:
    source, target = f"{kind.blocks}{index}.", f"encoder.layers.{index}."
    shapes = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner), "self_attn.projection": (width, width)}
    tensors = {target + "self_attn.qkv.weight": part.take(source + kind.qkv, 3 * width, width)}
    if kind is EVA:  # keys have no bias
        query, value = (part.take(f"{source}attn.{name}_bias", width) for name in ("q", "v"))
        bias = torch.cat([query, torch.zeros_like(query), value])
    else:
        bias = part.take(source + "attn.in_proj_bias", 3 * width)
    tensors[target + "self_attn.qkv.bias"] = bias
    for own, name in kind.layers.items():
        weight = shapes.get(name, (width,))
        tensors[f"{target}{name}.weight"] = part.take(f"{source}{own}.weight", *weight)
        tensors[f"{target}{name}.bias"] = part.take(f"{source}{own}.bias", weight[0])
    return tensors
