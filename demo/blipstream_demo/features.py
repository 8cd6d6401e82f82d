"""The frozen vision encoder's output for a rendered split, kept on disk in fp16 so that the Q-Former's two stages need
not compute it again: (N, 1 + P, D)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Blip2VisionModel

from . import data
from .vision import pixel_values

_CHUNK = 500


@torch.inference_mode()
def cache(path: Path, vision: Blip2VisionModel, split: data.Split, count: int) -> np.ndarray:
    """Features of the first ``count`` images of ``split``, read from ``path`` or computed, from where a killed run
    stopped."""
    patches = (vision.config.image_size // vision.config.patch_size) ** 2
    shape = (count, 1 + patches, vision.config.hidden_size)
    progress = path.with_suffix(".done")
    if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
        np.lib.format.open_memmap(path, "w+", np.float16, shape).flush()
        progress.write_text("0")
    features = np.load(path, mmap_mode="r+")
    for first in tqdm(range(int(progress.read_text()), count, _CHUNK), f"features {path.stem}", unit_scale=_CHUNK):
        last = min(first + _CHUNK, count)
        for start in range(first, last, 100):
            pixels = pixel_values(split.images[start : min(start + 100, last)])
            hidden = vision(pixel_values=pixels).last_hidden_state
            features[start : start + len(pixels)] = hidden.numpy()
        features.flush()
        progress.write_text(str(last))
    return np.load(path, mmap_mode="r")
