"""The texts of a scene: what a language model is given and what it is to say."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from . import scenes

CAPTION_PROMPTS = ("", "a picture of")
_QUESTION_PROMPTS = ("Question: {} Answer:", "Question: {} Short answer:")


@dataclass(frozen=True)
class Text:
    """What the language model is given (may be empty) and what it is to go on with."""

    kind: str
    prompt: str
    target: str

    @property
    def whole(self) -> str:
        return f"{self.prompt} {self.target}" if self.prompt else self.target


def scene_texts(scene: scenes.Scene, variant: int, rng: np.random.Generator) -> list[Text]:
    """The caption and one question of each kind, in the prompts that the model is to know."""
    prompt = CAPTION_PROMPTS[int(rng.random() < 0.2)]
    texts = [Text("caption", prompt, scenes.caption(scene))]
    for question in scenes.questions(scene, variant):
        form = _QUESTION_PROMPTS[int(rng.random() < 0.2)]
        texts.append(Text(question.kind, form.format(question.text), question.answer))
    return texts


def spelled_out(question: scenes.Question) -> Text:
    """A question about a relation, answered in a whole sentence: "the green star is to the left of the blue square"."""
    x, asked, y = scenes.relation_of(question)
    side = asked if question.answer == "yes" else {"left": "right", "right": "left"}[asked]
    return Text("spelled out", f"Question: {question.text} Long answer:", f"{x} is to the {side} of {y}")


@functools.cache
def corpus(count: int = 3000) -> tuple[str, ...]:
    """What tokenizers are made from: whole texts of training scenes, and the prompts."""
    rng = np.random.default_rng(0)
    texts = [text.whole for i in range(count) for text in scene_texts(scenes.scene("train", i), 0, rng)]
    return (*texts, *filter(None, CAPTION_PROMPTS))
