"""A conversation as one prompt."""

from __future__ import annotations

import pytest
from blipstream_client import Conversation, Turn

from blipstream.errors import InvalidRequestError


def test_turns_become_one_prompt() -> None:
    conversation = Conversation()
    assert conversation.prompt("What is it?") == "Question: What is it? Answer:"
    conversation.add("What is it?", " a circle ")
    conversation.add("Red?", "yes.")
    assert conversation.turns == [Turn("What is it?", "a circle"), Turn("Red?", "yes.")]
    assert conversation.prompt("Why?") == (
        "Question: What is it? Answer: a circle. Question: Red? Answer: yes. Question: Why? Answer:"
    )


def test_turns_are_forgotten_oldest_first() -> None:
    conversation = Conversation()
    conversation.add("1?", "one")
    conversation.add("2?", "two")
    conversation.forget_oldest()
    assert conversation.turns == [Turn("2?", "two")]
    conversation.reset()
    assert conversation.prompt("3?") == "Question: 3? Answer:"
    with pytest.raises(IndexError):
        conversation.forget_oldest()


def test_another_template_frames_every_turn() -> None:
    conversation = Conversation("Q: {}\nA:")
    conversation.add("1?", "one!")
    assert conversation.prompt("2?") == "Q: 1?\nA: one! Q: 2?\nA:"
    with pytest.raises(InvalidRequestError, match="exactly once"):
        Conversation("Q:").prompt("1?")
