"""What the decode loop is asked for and what it answers: plain data, validated where it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from blipstream.decoding.logits import Logits
from blipstream.errors import BlipstreamError, InvalidRequestError

MAX_TOP_K = 1 << 20


class FinishReason(str, Enum):
    """Why a sequence ended."""

    EOS = "eos"
    """The model generated an end token."""
    LENGTH = "length"
    """``max_tokens`` were generated, or the KV cache's row is full."""
    STOP = "stop"
    """A stop string appeared."""
    CANCELLED = "cancelled"
    """The client cancelled the request."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one sequence are chosen.

    Decoding is greedy unless ``temperature``, ``top_k`` or ``top_p`` asks for sampling (:attr:`greedy`). The order of
    the steps is that of ``transformers``: repetition penalty, presence and frequency penalty, bad words, minimum
    length, temperature, top-k, top-p.

    Raises:
        InvalidRequestError: a value is not finite or out of its range; the message names it.
    """

    max_tokens: int
    """New tokens at most, at least 1."""
    min_tokens: int = 0
    """New tokens before an end token may be chosen."""
    temperature: float | None = None
    """Divides the logits, > 0; 0 is greedy."""
    top_k: int | None = None
    """Keep the k largest logits; 1 is greedy, 0 keeps all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches p, 0 <= p <= 1; 1 keeps all; 0 leaves it to ``top_k``
    (greedy when that is 0 or not given), as in TensorRT-LLM."""
    repetition_penalty: float = 1.0
    """> 0; positive logits of tokens already seen (prompt included) are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of each token, times how often it was generated."""
    seed: int | None = None
    """Seed of this sequence's own random generator, 0 <= seed < 2**64; a fresh one when not given."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not part of it."""
    bad_words: tuple[str, ...] = ()
    """Strings that are never generated (as token sequences)."""
    log_probs: bool = False
    """Report the log probability of each chosen token, under the unmodified logits."""

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1, None)
        _check_integer("min_tokens", self.min_tokens, 0, None)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), but it is {self.min_tokens}"
            )
        if self.temperature is not None:
            _check_float("temperature", self.temperature, 0.0, None)
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 0, MAX_TOP_K)
        if self.top_p is not None:
            _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, None, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, None, None)
        _check_float("frequency_penalty", self.frequency_penalty, None, None)
        if self.seed is not None:
            _check_integer("random_seed", self.seed, 0, 2**64 - 1)
        for name, words in (("stop_words", self.stop), ("bad_words", self.bad_words)):
            if any(not word for word in words):
                raise InvalidRequestError(f"{name} must not hold an empty string")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is chosen, with no randomness."""
        if self.temperature is None and self.top_k is None and self.top_p is None:
            return True
        if self.temperature == 0.0 or self.top_k == 1:
            return True
        return self.top_p == 0.0 and not self.top_k


def _check_integer(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"
        raise InvalidRequestError(f"{name} must be {expected}, but it is {value}")


def _check_float(name: str, value: float, low: float | None, high: float | None, *, open_low: bool = False) -> None:
    in_range = math.isfinite(value)
    if low is not None:
        in_range = in_range and (value > low if open_low else value >= low)
    if high is not None:
        in_range = in_range and value <= high
    if in_range:
        return
    if low is None:
        expected = "a finite number"
    elif high is None:
        expected = f"a finite number {'above' if open_low else 'of at least'} {low:g}"
    else:
        expected = f"a number from {low:g} to {high:g}"
    raise InvalidRequestError(f"{name} must be {expected}, but it is {value}")


@dataclass(frozen=True)
class Prompt:
    """What a sequence starts from: soft tokens first, then token ids."""

    soft_tokens: npt.NDArray[np.float32]
    """(Q, D) soft tokens of the image."""
    token_ids: tuple[int, ...]
    """Token ids of the text, special tokens included; at least one."""

    @property
    def num_tokens(self) -> int:
        """Length in tokens, soft tokens included."""
        return int(self.soft_tokens.shape[0]) + len(self.token_ids)


def prefilled_tokens(prompt: Prompt, decoder_start_token_id: int | None) -> int:
    """Tokens in a row of the KV cache after a prefill: the prompt, or the start token where an encoder reads that."""
    return prompt.num_tokens if decoder_start_token_id is None else 1


@dataclass(frozen=True)
class Chunk:
    """One answer of the loop to a request: the tokens since the last chunk, or the error that ended it."""

    text: str
    """Text that has become certain since the last chunk; may be empty."""
    token_ids: tuple[int, ...]
    """Tokens generated since the last chunk, the end token included."""
    finish_reason: FinishReason | None
    """Set in the last chunk, unless ``error`` is."""
    num_input_tokens: int
    """Soft tokens + prompt."""
    num_output_tokens: int
    """Tokens generated so far, the end token included."""
    log_probs: tuple[float, ...] = ()
    """Natural logarithms, one for each of ``token_ids``, when asked for."""
    error: BlipstreamError | None = None

    @property
    def is_last(self) -> bool:
        """Whether no further chunk follows."""
        return self.finish_reason is not None or self.error is not None


def _never() -> bool:
    return False


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    on_chunk: Callable[[Chunk], None]
    """Called on the loop's thread, in order; must not block. Every accepted request gets exactly one last chunk."""
    is_cancelled: Callable[[], bool] = _never
    """Polled before each step."""
    start_by: float | None = None
    """Time (``time.monotonic()``, seconds) by which the sequence must have a slot."""
    arrived_at: float = field(default=0.0)
    """Time (``time.monotonic()``, seconds) at which the client's request arrived; for the time to first token."""
    bad_word_ids: Sequence[tuple[int, ...]] | None = None
    """Token sequences of ``params.bad_words``; when not given, the loop's caller waits until they are tokenized."""


class Decoder(Protocol):
    """A language model with a KV cache in compact slots: what the loop needs of an engine.

    Running sequences hold rows ``0 .. n - 1``. The loop alone calls it, from one thread. A decoder-only model keeps the
    prompt in a row of its cache, and goes on behind it; one with an encoder keeps apart what the encoder made of the
    prompt, and a row begins with a start token.
    """

    @property
    def max_sequences(self) -> int:
        """Rows of the KV cache."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens that one row holds."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens, soft tokens included."""
        ...

    @property
    def decoder_start_token_id(self) -> int | None:
        """The token that every row begins with, behind an encoder; None for a decoder-only model."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width V of the logits."""
        ...

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> Logits:
        """Fill rows ``first_row ..`` with the prompts; return the logits (B, V) of the first token behind each.

        Raises:
            EngineError: the engine failed; the rows' contents are undefined.
        """
        ...

    def decode(self, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Logits:
        """Append token ``token_ids[i]`` to row i, which holds ``lengths[i]`` tokens; return the logits (n, V).

        Raises:
            EngineError: the engine failed; the rows' contents are undefined.
        """
        ...

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy row ``source``, which holds ``length`` tokens, over row ``target``."""
        ...
