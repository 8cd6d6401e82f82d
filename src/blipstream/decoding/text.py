"""From text to token ids and back: encoding, incremental decoding, stop strings."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from blipstream.errors import BundleError, InvalidRequestError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The language model's tokenizer (``tokenizers`` library). Safe to use from several threads.

    A text that spells a special token, such as ``</s>``, is encoded as any other text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._backend = backend

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            BundleError: no such file, or not a tokenizer.
        """
        if not path.is_file():
            raise BundleError(f"there is no tokenizer at {path}")
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; with ``special_tokens``, the ones that the tokenizer puts around a text as well.

        Raises:
            InvalidRequestError: the text spells a special token that the tokenizer cannot encode as text.
        """
        encoding = self._backend.encode(text, add_special_tokens=special_tokens)
        self._check(text, encoding)
        return tuple(encoding.ids)

    def _check(self, text: str, encoding: tokenizers.Encoding) -> None:
        """A Unigram model (T5's) has its special tokens among its pieces, and finds them in a text."""
        own = {token for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not added}
        for token in sorted(own & self._special.keys()):
            normalizer = self._backend.normalizer
            spelt = text if normalizer is None else normalizer.normalize_str(text)
            if self._special[token] in spelt:  # an unknown character is a special token as well, and no fault
                raise InvalidRequestError(
                    f"the text must not contain {self._special[token]!r}, which is a special token of this model"
                )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def word_sequences(self, words: Iterable[str]) -> list[tuple[int, ...]]:
        """Token sequences that spell each word, at the start of a text and after a space."""
        spellings = (self.encode(prefix + word, special_tokens=False) for word in words for prefix in ("", " "))
        return [ids for ids in dict.fromkeys(spellings) if ids]


class TextStream:
    """The text of one sequence, released as it becomes certain.

    The released pieces add up to ``Tokenizer.decode`` of all tokens, or to what comes before the first stop string in
    it. Held back are: tokens that end in the middle of a character, and text that may be the beginning of a stop
    string. (One exception, which text of a working model does not meet: a decoder of single bytes beside pieces, as
    LLaMA's, gives up a whole run of bytes for the first of them that is not UTF-8; here, whole characters before it
    are out by then.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._pieces = _TokenPieces(tokenizer)
        self._stop = StopStrings(stop) if stop else None
        self._held = ""
        self.stopped = False
        """Whether a stop string has appeared. Nothing is released after it."""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that has become certain, which may be empty."""
        return self._release(self._pieces.push(token_id))

    def flush(self) -> str:
        """End the text; return what was held back."""
        text = self._release(self._pieces.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._stop is None:
            return text
        text = self._held + text
        start = self._stop.find(text)
        if start is not None:
            self.stopped, self._held = True, ""
            return text[:start]
        keep = self._stop.open_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class StopStrings:
    """Strings of which the first to be complete is looked for; the time that takes hardly grows with their number.

    Args:
        strings: at least one, none of them empty.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._sorted: list[str] = []
        for string in sorted(strings):
            if not (self._sorted and string.startswith(self._sorted[-1])):  # else that other one is complete first
                self._sorted.append(string)
        self._longest = max(map(len, self._sorted))

    def find(self, text: str) -> int | None:
        """Where the string starts that is complete first in ``text``, however that was cut into tokens."""
        ends = []
        for start in range(len(text)):
            # none of the strings begins another, so only the nearest in order can be what the text goes on with
            nearest = bisect_right(self._sorted, text[start : start + self._longest]) - 1
            if nearest >= 0 and text.startswith(self._sorted[nearest], start):
                ends.append((start + len(self._sorted[nearest]), start))
        return min(ends)[1] if ends else None

    def open_length(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            nearest = bisect_left(self._sorted, end)
            if nearest < len(self._sorted) and self._sorted[nearest].startswith(end):
                return length
        return 0


class _TokenPieces:
    """Turns tokens into pieces of text, each of whole characters.

    A window of recent tokens is decoded at each step. Its first part, whose text has been released, gives the rest
    the context that some decoders need (a leading space kept or dropped).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_released = 0
        self._released = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._released):
            return ""  # in the middle of a character, or a token without text
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, text: str) -> str:
        piece = text[len(self._released) :]
        self._window = self._window[self._num_released :]
        self._num_released = len(self._window)
        self._released = self._tokenizer.decode(self._window)
        return piece
