"""How often a bundle answers rightly on a test set: what a precision costs in practice.

A test set is a file of JSON lines, one question each:

    {"image": "photos/1.jpg", "prompt": "Question: what is this? Answer:", "answers": ["a cat"], "kind": "object"}

``image`` is relative to the file. An empty or missing ``prompt`` asks for a caption. An answer is right when it is one
of ``answers``, letter case, spaces and a full stop at the end aside. The report has a row for each ``kind``, which may
be left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blipstream.errors import BundleError, InvalidImageError
from blipstream.preprocess import decode_image
from blipstream_export.inprocess import InProcess

_BATCH = 64
"""Questions in flight."""


class Question(BaseModel):
    """A line of a test set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Path
    prompt: str = ""
    answers: tuple[str, ...] = Field(min_length=1)
    kind: str = "all"

    def is_right(self, answer: str) -> bool:
        """Whether ``answer`` is one of those expected."""
        return _plain(answer) in {_plain(expected) for expected in self.answers}


@dataclass(frozen=True)
class Accuracy:
    """How many questions of one kind were answered rightly."""

    kind: str
    asked: int
    right: int


def read_test_set(path: Path) -> list[Question]:
    """Read a test set; the images' paths come back complete.

    Raises:
        BundleError: no such file, no question in it, a line that is none, or an image that is not there; the message
            names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line separators
    except UnicodeDecodeError:
        raise BundleError(f"the test set {path} cannot be read: it is not UTF-8") from None
    except OSError as error:
        raise BundleError(f"the test set {path} cannot be read: {error.strerror}") from None
    questions = [_question(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise BundleError(f"the test set {path} holds no question")
    return questions


def read_images(folder: Path) -> list[Image.Image]:
    """Every image file of a folder, in the order of their names.

    Raises:
        BundleError: no such folder, no image in it, or one that cannot be decoded.
    """
    known = Image.registered_extensions()
    if not folder.is_dir():
        raise BundleError(f"there is no folder of images {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not paths:
        raise BundleError(f"the folder {folder} holds no image file")
    return [_decode(path) for path in paths]


def measure_accuracy(
    bundle: Path,
    questions: Sequence[Question],
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Accuracy, ...]:
    """Ask a bundle every question; one row for each kind, in the order in which they first come.

    Raises:
        BundleError: an image cannot be decoded, or the bundle not be run (:class:`InProcess`).
    """
    right: dict[str, list[bool]] = {question.kind: [] for question in questions}
    with InProcess(bundle) as model:
        for first in range(0, len(questions), _BATCH):
            on_progress(first, len(questions))
            part = questions[first : first + _BATCH]
            images = [image for path, group in groupby(part, lambda q: q.image) for image in _repeated(path, group)]
            for question, answer in zip(part, model.generate(images, [q.prompt for q in part]), strict=True):
                right[question.kind].append(question.is_right(answer))
    return tuple(Accuracy(kind, len(judged), sum(judged)) for kind, judged in right.items())


def _repeated(path: Path, group: Iterator[Question]) -> list[Image.Image]:
    """One image for each of the questions about it."""
    image = _decode(path)
    return [image for _ in group]


def _decode(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes())
    except InvalidImageError as error:
        raise BundleError(f"the image {path} cannot be read: {error}") from None


def _question(path: Path, number: int, line: str) -> Question:
    try:
        fields = json.loads(line)
        question = Question.model_validate(fields)
    except ValidationError as error:
        fault = _fault(fields, error)
        raise BundleError(f"line {number} of the test set {path} is no question: {fault}") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise BundleError(f"line {number} of the test set {path} is not valid JSON: {where}") from None
    image = path.parent / question.image
    if not image.is_file():
        raise BundleError(f"line {number} of the test set {path} names an image that is not there: {image}")
    return question.model_copy(update={"image": image})


_FIELDS = {
    "image": "the path of an image",
    "prompt": "a text",
    "answers": "a list of texts, one at least",
    "kind": "a text",
}
"""What is expected of each field of a question."""


def _fault(fields: Any, error: ValidationError) -> str:
    """The first fault, in words of the file."""
    if not isinstance(fields, dict):
        return f"expected a JSON object with {' and '.join(_REQUIRED)}, but it is {json.dumps(fields)}"
    if unknown := [name for name in fields if name not in _FIELDS]:
        return f"it has the field {unknown[0]!r}, and the fields of a question are {', '.join(_FIELDS)}"
    name = str(error.errors()[0]["loc"][0])
    found = f"it is {json.dumps(fields[name], ensure_ascii=False)}" if name in fields else "it is not there"
    return f"the field {name!r} must be {_FIELDS[name]}, but {found}"


_REQUIRED = ("image", "answers")


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split()).removesuffix(".")
