"""Several questions about one image, each asked with what was said before."""

from __future__ import annotations

from dataclasses import dataclass, field

from blipstream.contract import QUESTION_TEMPLATE
from blipstream_client.options import question_prompt


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass
class Conversation:
    """The turns so far, and the prompt that they make.

    BLIP-2 has no chat format. What it was shown is a question and a short answer, so a conversation is a chain of those
    in one prompt, each answer closed by a full stop: "Question: Q1 Answer: A1. Question: Q2 Answer:". The model's
    authors chain them so in the demonstrations of LAVIS.
    """

    template: str = QUESTION_TEMPLATE
    turns: list[Turn] = field(default_factory=list)

    def prompt(self, question: str) -> str:
        """The prompt that asks ``question`` after all turns so far."""
        parts = [f"{question_prompt(turn.question, self.template)} {_closed(turn.answer)}" for turn in self.turns]
        return " ".join([*parts, question_prompt(question, self.template)])

    def add(self, question: str, answer: str) -> None:
        """Append a turn."""
        self.turns.append(Turn(question, answer.strip()))

    def forget_oldest(self) -> None:
        """Drop the oldest turn. Raises IndexError when there is none."""
        del self.turns[0]

    def reset(self) -> None:
        """Drop all turns."""
        self.turns.clear()


def _closed(answer: str) -> str:
    return answer if answer.endswith((".", "!", "?")) else f"{answer}."
