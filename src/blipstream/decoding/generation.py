"""One request on its way through the decode loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from blipstream.decoding.observer import LoopObserver
from blipstream.decoding.request import Chunk, FinishReason, GenerationRequest, Prompt, prefilled_tokens
from blipstream.decoding.sampler import Choice, TokenChooser
from blipstream.decoding.text import TextStream, Tokenizer
from blipstream.errors import BlipstreamError, InvalidRequestError, PromptTooLongError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationLimits:
    """What the model and its KV cache ask of a request."""

    vocab_size: int
    max_tokens: int
    """Tokens of one row of the KV cache."""
    max_prompt_tokens: int
    """Soft tokens + prompt at most."""
    decoder_start_token_id: int | None
    """What a row begins with behind an encoder; None where it holds the prompt itself."""
    eos_token_ids: frozenset[int]
    image_token_id: int | None


class Generation:
    """The state of a request from its arrival to its last chunk. Compared by identity.

    It tells its client about every token; a client that cannot take a chunk is treated as one that cancelled.

    Args:
        request: what is to be generated.
        tokenizer: the language model's.
        limits: what the request has to keep to; its ``max_tokens`` is cut to the room that there is in a row.
        observer: is told of the first token and of the end.
        clock: seconds; the clock of ``request.arrived_at``.

    Raises:
        PromptTooLongError: the prompt is longer than what can be read, or leaves no room for a generated token.
        InvalidRequestError: the prompt is empty, or holds ids that are no tokens.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        limits: GenerationLimits,
        observer: LoopObserver,
        clock: Callable[[], float],
    ) -> None:
        _check_prompt(request.prompt, limits)
        self.request = request
        self.arrived_at = request.arrived_at or clock()
        self.num_prompt_tokens = request.prompt.num_tokens
        """Soft tokens + prompt."""
        self.chooser = _token_chooser(request, tokenizer, limits)
        self.token_ids: list[int] = []
        """Tokens generated so far."""
        self.cancelled = False
        """Whether the client wants no more of it; the loop drops it before the next step."""
        self.ended = False
        """Whether its last chunk is out."""
        self._text = TextStream(tokenizer, request.params.stop)
        self._num_prefilled_tokens = prefilled_tokens(request.prompt, limits.decoder_start_token_id)
        self._max_new_tokens = min(request.params.max_tokens, limits.max_tokens - self._num_prefilled_tokens)
        self._eos_token_ids = limits.eos_token_ids
        self._observer = observer
        self._clock = clock

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that its row of the KV cache holds: all but the newest, which the next step appends."""
        return self._num_prefilled_tokens + len(self.token_ids) - 1

    @property
    def start_by(self) -> float | None:
        """Time by which it must have a slot."""
        return self.request.start_by

    def poll(self) -> None:
        """Ask whether the client has cancelled."""
        try:
            self.cancelled = self.cancelled or self.request.is_cancelled()
        except Exception:
            _log.exception("request %s is dropped: is_cancelled failed", self.request.request_id)
            self.cancelled = True

    def append(self, choice: Choice) -> None:
        """Take the next token and tell the client."""
        self.token_ids.append(choice.token_id)
        if len(self.token_ids) == 1:
            self._observer.on_first_token(self._clock() - self.arrived_at)
        text = self._text.push(choice.token_id)
        if self._reason() is not None:
            text += self._text.flush()
        self._tell(text, choice, self._reason())  # asked again: what was held back may hold a stop string

    def cancel(self) -> None:
        """End because the client does not want the rest."""
        self._tell(reason=FinishReason.CANCELLED)

    def fail(self, error: BlipstreamError) -> None:
        """End with an error."""
        self._tell(error=error)

    def _reason(self) -> FinishReason | None:
        if self._text.stopped:
            return FinishReason.STOP
        if self.token_ids[-1] in self._eos_token_ids:
            return FinishReason.EOS
        if len(self.token_ids) >= self._max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _tell(
        self,
        text: str = "",
        choice: Choice | None = None,
        reason: FinishReason | None = None,
        error: BlipstreamError | None = None,
    ) -> None:
        chunk = Chunk(
            text=text,
            token_ids=() if choice is None else (choice.token_id,),
            finish_reason=reason,
            num_input_tokens=self.num_prompt_tokens,
            num_output_tokens=len(self.token_ids),
            log_probs=() if choice is None or choice.log_prob is None else (choice.log_prob,),
            error=error,
        )
        if chunk.is_last:
            self.ended = True
            self._observer.on_end("error" if reason is None else reason.value)
        try:
            self.request.on_chunk(chunk)
        except Exception:
            _log.exception("request %s is dropped: on_chunk failed", self.request.request_id)
            if not self.ended:
                self.cancel()


def _check_prompt(prompt: Prompt, limits: GenerationLimits) -> None:
    if not prompt.token_ids:
        raise InvalidRequestError("the prompt must hold at least one token after the soft tokens, but it holds none")
    foreign = [token for token in prompt.token_ids if not 0 <= token < limits.vocab_size]
    if foreign:
        raise InvalidRequestError(
            f"the prompt's token ids must be from 0 to {limits.vocab_size - 1}, but one of them is {foreign[0]}"
        )
    if prompt.num_tokens > limits.max_prompt_tokens:
        bound = "leave room for an answer" if limits.decoder_start_token_id is None else "can be read"
        raise PromptTooLongError(
            f"the prompt has {prompt.num_tokens} tokens, {len(prompt.soft_tokens)} of them for the image, and at most "
            f"{limits.max_prompt_tokens} {bound}"
        )


def _token_chooser(request: GenerationRequest, tokenizer: Tokenizer, limits: GenerationLimits) -> TokenChooser:
    bad_words = request.bad_word_ids
    return TokenChooser(
        request.params,
        prompt_ids=_seen_ids(request.prompt, limits),
        eos_token_ids=limits.eos_token_ids,
        bad_words=tokenizer.word_sequences(request.params.bad_words) if bad_words is None else bad_words,
        vocab_size=limits.vocab_size,
    )


def _seen_ids(prompt: Prompt, limits: GenerationLimits) -> tuple[int, ...]:
    """The ids that ``generate`` in transformers shows its logits processors before the first token.

    A decoder-only model's are the prompt with a placeholder for each soft token; behind an encoder, the start token.
    """
    if limits.decoder_start_token_id is not None:
        return (limits.decoder_start_token_id,)
    placeholders = () if limits.image_token_id is None else (limits.image_token_id,) * len(prompt.soft_tokens)
    return (*placeholders, *prompt.token_ids)
