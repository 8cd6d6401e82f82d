"""The requests: rendered test scenes of the demo's world as PNG files, every other one with a question."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from benchmarks.harness import Request

DEMO = Path(__file__).resolve().parent.parent / "demo"
CHECKPOINT = DEMO / "checkpoint"
if str(DEMO) not in sys.path:
    sys.path.insert(0, str(DEMO))

from blipstream_demo import scenes  # noqa: E402  # the demo is a folder of the repository, no installed package

DISTINCT, REPEATED = "distinct", "repeated"
REPEATED_IMAGES = 4
"""Images that all requests of the repeated load share."""


def distinct(split: str, first: int, count: int) -> list[Request]:
    """Requests about ``count`` scenes of ``split``, from scene ``first`` on: a caption, a question, a caption, ..."""
    return [_request(split, index, index) for index in range(first, first + count)]


def repeated(split: str, first: int, count: int) -> list[Request]:
    """The same prompts as of as many scenes, asked about the first few of them alone."""
    return [_request(split, first + number % REPEATED_IMAGES, first + number) for number in range(count)]


def _request(split: str, scene_index: int, number: int) -> Request:
    scene = scenes.scene(split, scene_index)
    if number % 2 == 0:
        return Request(_png(scene), "")
    asked = scenes.questions(scene, variant=number)
    return Request(_png(scene), asked[number // 2 % len(asked)].prompt)


def _png(scene: scenes.Scene) -> bytes:
    buffer = io.BytesIO()
    scenes.render(scene).save(buffer, "PNG")
    return buffer.getvalue()
