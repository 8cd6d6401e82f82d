"""The rendered splits on disk: uint8 arrays that training maps into memory.

A split is a folder with ``images.npy`` (N, 96, 96, 3) uint8, ``labels.npy`` (N, 24, 24) uint8 as of
:func:`scenes.render_with_labels`, and ``things.npy`` (N, 7, 3) uint8: size, colour and shape of the objects from the
left, 255 where there is none. The split "crowd" holds :func:`scenes.crowd`. A split is filled chunk by chunk; a marker
file tells which chunks are whole.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import scenes

NONE = 255
PLACES = 7
_CHUNK = 1000
_FIELDS = {
    "images": (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3),
    "labels": (24, 24),
    "things": (PLACES, 3),
}


@dataclass(frozen=True)
class Split:
    """A rendered split, mapped into memory; the shapes are those of the module's docstring."""

    images: np.ndarray
    labels: np.ndarray
    things: np.ndarray


def encode(scene: scenes.Scene) -> np.ndarray:
    """The attributes of a scene's objects as indices: (PLACES, 3) uint8, NONE where there is no object."""
    codes = np.full((PLACES, 3), NONE, np.uint8)
    for row, (size, colour, shape) in enumerate(scene.triples):
        codes[row] = scenes.SIZES.index(size), scenes.COLOURS.index(colour), scenes.SHAPES.index(shape)
    return codes


def decode(codes: np.ndarray) -> list[scenes.Triple]:
    """The objects of :func:`encode`, from the left."""
    return [
        (scenes.SIZES[size], scenes.COLOURS[colour], scenes.SHAPES[shape])
        for size, colour, shape in codes.tolist()
        if size != NONE
    ]


def render_split(folder: Path, split: str, count: int, processes: int = 2) -> Split:
    """Render the first ``count`` scenes of ``split`` into ``folder``, or go on where an earlier call stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: _array(folder / f"{name}.npy", (count, *shape)) for name, shape in _FIELDS.items()}
    chunks = [(folder, split, first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    todo = [chunk for chunk in chunks if not _marker(*chunk).exists()]
    if todo:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in tqdm(pool.imap_unordered(_render_chunk, todo), f"render {split}", len(todo), unit="k"):
                pass
    return Split(**arrays)


def _render_chunk(chunk: tuple[Path, str, int, int]) -> None:
    folder, split, first, last = chunk
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _FIELDS}
    for index in range(first, last):
        scene = scenes.crowd(index) if split == "crowd" else scenes.scene(split, index)
        image, labels = scenes.render_with_labels(scene)
        arrays["images"][index] = np.asarray(image)
        arrays["labels"][index] = labels
        arrays["things"][index] = encode(scene)
    for array in arrays.values():
        array.flush()
    _marker(*chunk).touch()


def _marker(folder: Path, split: str, first: int, last: int) -> Path:
    return folder / f"done-{split}-{first}-{last}"


def _array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array at ``path``, made anew (and its markers removed) where it is missing or has another shape."""
    if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
        for marker in path.parent.glob("done-*"):
            marker.unlink()
        np.lib.format.open_memmap(path, "w+", np.uint8, shape).flush()
    return np.load(path, mmap_mode="r")


def open_split(folder: Path) -> Split:
    """A split that :func:`render_split` has rendered."""
    return Split(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FIELDS})
