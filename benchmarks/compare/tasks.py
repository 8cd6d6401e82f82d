"""What every system is asked: the same requests for all of them, others in each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blipstream.bench.workload import Lengths, Sizes, Workload

CAPTION_TOKENS = 20
PROMPT_TOKENS = 33
"""Of a plain caption: 32 soft tokens and the token that starts a text."""
_FIRST_WORD, _WORDS = 300, 30_000
"""Ids of which prompts are made: no special ones, and none beyond any vocabulary."""
_PICTURES = Sizes((320, 240), (1024, 768))
_QUESTION_BYTES = Lengths(11, 4)
"""Tokens of a question in a published model's tokenizer; a random checkpoint's has one for each byte."""
_LETTERS = list("abcdefgh ijklmno")
QUESTIONS = 4
"""About each image, of VQA; its data sets have five."""
_ANSWER_TOKENS = Lengths(20, 10)

Requests = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One kind of work.

    Attributes:
        name: as the programs know it.
        count: requests of a round.
        make: a round's requests, from its number and a folder for its files.
    """

    name: str
    count: int
    make: Callable[[int, int, Path], Requests]

    def requests(self, number: int, folder: Path) -> Requests:
        """Those of one round; the same each time."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.make(number, self.count, folder)


def tokens_of(requests: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that a round's answers have, all together; 0 where answers are arrays."""
    return sum(request.get("tokens", 0) for request in requests)


def _images(number: int, count: int, folder: Path) -> list[str]:
    workload = Workload(count, _PICTURES, None, Lengths(1), seed=number)
    paths = [folder / f"{number}-{index}.jpg" for index in range(count)]
    if not all(path.exists() for path in paths):
        for path, request in zip(paths, workload.requests(count), strict=True):
            path.write_bytes(request.image)
    return [str(path) for path in paths]


def _captions(number: int, count: int, folder: Path) -> Requests:
    return [{"image": path, "prompt": "", "tokens": CAPTION_TOKENS} for path in _images(number, count, folder)]


def _features(number: int, count: int, folder: Path) -> Requests:
    return [{"image": path} for path in _images(number, count, folder)]


def _answers(per_image: int, number: int, count: int, folder: Path) -> Requests:
    rng = np.random.default_rng(number)
    letters = ["".join(rng.choice(_LETTERS, size)) for size in _QUESTION_BYTES.draw(rng, count)]
    lengths = _ANSWER_TOKENS.draw(rng, count)
    images = _images(number, -(-count // per_image), folder)
    return [
        {"image": images[index // per_image], "prompt": f"q{text}?", "tokens": tokens}
        for index, (text, tokens) in enumerate(zip(letters, lengths, strict=True))
    ]


def _language(number: int, count: int, _folder: Path) -> Requests:
    rng = np.random.default_rng(number)
    prompts = rng.integers(_FIRST_WORD, _WORDS, (count, PROMPT_TOKENS)).tolist()
    return [{"ids": ids, "tokens": CAPTION_TOKENS} for ids in prompts]


def _vision(side: int, number: int, count: int, folder: Path) -> Requests:
    rng = np.random.default_rng(number)
    paths = [folder / f"{number}-{index}.npy" for index in range(count)]
    for path in paths:
        np.save(path, rng.normal(0, 1, (1, 3, side, side)).astype(np.float32))
    return [{"pixels": str(path)} for path in paths]


FEATURES, VISION, CAPTION, ANSWERS, VQA, LANGUAGE = "features", "vision", "caption", "answers", "vqa", "language"


def make_tasks(answers: int, side: int) -> dict[str, Task]:
    """All tasks, by name.

    Args:
        answers: requests of a round of answers.
        side: of the pixels that the ViT takes.
    """
    single = {FEATURES: _features, VISION: partial(_vision, side), CAPTION: _captions}
    tasks = {name: Task(name, 1, make) for name, make in single.items()}
    tasks[ANSWERS] = Task(ANSWERS, answers, partial(_answers, 1))
    tasks[VQA] = Task(VQA, answers, partial(_answers, QUESTIONS))
    for rows in (1, 4, 16):
        tasks[f"{LANGUAGE}-{rows}"] = Task(LANGUAGE, rows, _language)
    return tasks
