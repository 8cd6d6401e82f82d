"""A tokenizer of bytes and a decoder without a model, for tests of the loop."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tokenizers

from blipstream.decoding.loop import DecodeLoop
from blipstream.decoding.request import Chunk, FinishReason, GenerationRequest, Prompt, SamplingParams
from blipstream.decoding.text import Tokenizer

EOS = 256
VOCAB_SIZE = 257
START = 7
"""What a row of :class:`FakeEncoderDecoder` begins with."""


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Token k is byte k; token 256 is the special end token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_visible_bytes(), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


def _visible_bytes() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if it is visible, one beyond Latin-1 if not."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


class FakeDecoder:
    """Logits are a fixed function of everything that a row holds, so that any mix-up of rows changes tokens.

    A row that was moved away, or that no prefill has filled, holds nothing that could be used by mistake.
    """

    vocab_size = VOCAB_SIZE
    decoder_start_token_id: int | None = None

    def __init__(self, max_sequences: int = 4, max_tokens: int = 64, eos_bias: float = 0.0) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.eos_bias = eos_bias
        self.rows: list[list[float] | None] = [None] * max_sequences
        self.prefills: list[int] = []
        """Number of prompts of each prefill."""
        self.steps: list[int] = []
        """Number of rows of each decode step."""

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_tokens - 1

    def logits(self, history: Sequence[float]) -> npt.NDArray[np.float32]:
        seed = zlib.crc32(np.array(history, np.float64).tobytes())
        logits = np.random.default_rng(seed).normal(0, 2, VOCAB_SIZE).astype(np.float32)
        logits[EOS] += self.eos_bias
        return logits

    @staticmethod
    def history(prompt: Prompt) -> list[float]:
        return [*(float(row.sum()) + 0.5 for row in prompt.soft_tokens), *prompt.token_ids]

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> npt.NDArray[np.float32]:
        assert prompts
        assert first_row + len(prompts) <= self.max_sequences
        self.prefills.append(len(prompts))
        for row, prompt in enumerate(prompts, first_row):
            assert prompt.num_tokens <= self.max_prompt_tokens
            self.rows[row] = self.history(prompt)
        return np.stack([self.logits(self.history(prompt)) for prompt in prompts])

    def decode(self, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.steps.append(len(token_ids))
        result = []
        for row, (token, length) in enumerate(zip(token_ids, lengths, strict=True)):
            history = self.rows[row]
            assert history is not None, f"row {row} is stepped, but holds nothing"
            assert self.length(row) == length < self.max_tokens
            history.append(int(token))
            result.append(self.logits(history))
        return np.stack(result)

    def move_row(self, source: int, target: int, length: int) -> None:
        history = self.rows[source]
        assert history is not None
        assert self.length(source) == length
        self.rows[target], self.rows[source] = history, None

    def length(self, row: int) -> int:
        """Tokens that a row of the cache holds."""
        return len(self.rows[row] or ())


class FakeEncoderDecoder(FakeDecoder):
    """The same behind an encoder: a row begins with the start token, and its prompt is kept elsewhere."""

    decoder_start_token_id = START

    def __init__(
        self, max_sequences: int = 4, max_tokens: int = 64, eos_bias: float = 0.0, max_prompt_tokens: int = 40
    ) -> None:
        super().__init__(max_sequences, max_tokens, eos_bias)
        self._max_prompt_tokens = max_prompt_tokens
        self.prompts: dict[int, int] = {}
        """Tokens of the prompt of each row."""

    @property
    def max_prompt_tokens(self) -> int:
        return self._max_prompt_tokens

    @staticmethod
    def history(prompt: Prompt) -> list[float]:
        return [*FakeDecoder.history(prompt), -1.0, START]

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> npt.NDArray[np.float32]:
        logits = super().prefill(first_row, prompts)
        self.prompts |= {row: prompt.num_tokens + 1 for row, prompt in enumerate(prompts, first_row)}
        return logits

    def move_row(self, source: int, target: int, length: int) -> None:
        super().move_row(source, target, length)
        self.prompts[target] = self.prompts.pop(source)

    def length(self, row: int) -> int:
        return super().length(row) - self.prompts[row]


class Client:
    """Collects the chunks of one request and checks the promises that every request has."""

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str = "",
        start_by: float | None = None,
        arrived_at: float = 0.0,
    ) -> None:
        self.chunks: list[Chunk] = []
        self.cancelled = False
        self.request = GenerationRequest(
            request_id, prompt, params, self.on_chunk, lambda: self.cancelled, start_by, arrived_at
        )

    def on_chunk(self, chunk: Chunk) -> None:
        assert not self.done, "a chunk came after the last one"
        self.chunks.append(chunk)
        assert chunk.num_output_tokens == len(self.token_ids)
        assert chunk.num_input_tokens == self.request.prompt.num_tokens

    @property
    def done(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].is_last

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def log_probs(self) -> list[float]:
        return [value for chunk in self.chunks for value in chunk.log_probs]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason

    @property
    def error(self) -> Exception | None:
        return self.chunks[-1].error if self.chunks else None


def make_prompt(seed: int, num_soft: int = 2, num_text: int = 3) -> Prompt:
    rng = np.random.default_rng(seed)
    soft = rng.normal(0, 1, (num_soft, 4)).astype(np.float32)
    return Prompt(soft, tuple(int(token) for token in rng.integers(0, 256, num_text)))


def run(loop: DecodeLoop, max_steps: int = 10_000) -> None:
    """Drive a loop until it has nothing to do, with its books checked after every iteration."""
    for _ in range(max_steps):
        more = loop.step()
        loop.check_integrity()
        if not more:
            return
    raise AssertionError(f"the loop is still busy after {max_steps} steps")
