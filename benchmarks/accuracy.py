"""How often a bundle of the demo checkpoint is right about the demo's test scenes, in process and without a server.

    python -m benchmarks.accuracy BUNDLE [BUNDLE ...] [--scenes 1000]

Prints one row a bundle: captions right, answers right, each over all scenes; with several bundles, the share of texts
that equal those of the first as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blipstream_export.inprocess import InProcess
from PIL import Image

from benchmarks import workload  # noqa: F401  (puts the demo's folder on the path)

from blipstream_demo import evaluation, scenes  # isort: skip  # importable once the workload's module is


@dataclass(frozen=True)
class Accuracy:
    """Shares of what is right, and every text."""

    captions: float
    questions: float
    texts: tuple[str, ...]


def measure(bundle: Path, shown: Sequence[scenes.Scene], images: Sequence[Image.Image]) -> Accuracy:
    """Caption each scene, and ask one question of each kind about it."""
    texts: list[str] = []

    def generate(batch: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        found = model.generate(batch, prompts)
        texts.extend(found)
        return found

    with InProcess(bundle) as model:
        figures = evaluation.generation(generate, shown, images)
    kinds = figures["questions"].values()
    right = sum(kind["all"] * kind["n"] for kind in kinds) / sum(kind["n"] for kind in kinds)
    return Accuracy(figures["captions"]["right"]["all"], right, tuple(texts))


def main() -> int:
    """Measure every bundle named on the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description="Accuracy on the demo's test scenes.")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--scenes", type=int, default=1000)
    options = parser.parse_args()
    shown = scenes.test_scenes(options.scenes)
    images = [scenes.render(scene) for scene in shown]
    first: Accuracy | None = None
    for bundle in options.bundles:
        found = measure(bundle, shown, images)
        first = first or found
        equal = np.mean([a == b for a, b in zip(found.texts, first.texts, strict=True)])
        print(
            f"{bundle.name}: captions right {found.captions:.2%}, answers right {found.questions:.2%}, texts equal to "
            f"{options.bundles[0].name}'s {equal:.2%}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
