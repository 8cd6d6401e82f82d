"""The decoding options of a request, and the templates that make a prompt of a question."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypedDict

from blipstream.contract import QUESTION_TEMPLATE
from blipstream.errors import InvalidRequestError


class DecodingOptions(TypedDict, total=False):
    """How the text is generated; what is left out keeps the checkpoint's own default.

    Decoding is greedy unless ``temperature``, ``top_k`` or ``top_p`` asks for sampling. The server checks the ranges.
    """

    max_tokens: int
    """Tokens to generate at most."""
    min_tokens: int
    """Tokens to generate before the text may end."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    top_k: int
    """Sample among the k likeliest tokens; 0 keeps all, 1 is greedy."""
    top_p: float
    """Sample among the likeliest tokens whose probability reaches p."""
    repetition_penalty: float
    """Makes tokens already seen less likely, above 1."""
    presence_penalty: float
    """Subtracted from the logits of tokens already generated."""
    frequency_penalty: float
    """Subtracted from the logits of tokens already generated, times how often."""
    seed: int
    """Seed of the samples: the same seed gives the same text, whatever else the server is doing."""
    stop: str | Sequence[str]
    """Strings that end the text; they are not part of it."""
    bad_words: str | Sequence[str]
    """Strings whose sequence of tokens is never generated."""
    log_probs: bool
    """Answer the log probability of each token."""


def check_names(options: Mapping[str, object]) -> None:
    """Refuse options that do not exist.

    Raises:
        TypeError: names the unknown option, and the one that it resembles.
    """
    known = DecodingOptions.__annotations__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}"
            raise TypeError(f"unknown decoding option {name!r}: {hint}")


def question_prompt(question: str, template: str = QUESTION_TEMPLATE) -> str:
    """Put a question into a template; the template ``"{}"`` leaves it as it is.

    Raises:
        InvalidRequestError: the template does not hold ``{}`` exactly once.
    """
    if template.count("{}") != 1:
        raise InvalidRequestError(f"the question's template must hold {{}} exactly once, but it is {template!r}")
    return template.replace("{}", question)
