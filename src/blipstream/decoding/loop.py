"""The decode loop with in-flight batching: schedule, run, postprocess.

Sequences join and leave at every iteration. An iteration

1. drops the sequences whose clients cancelled,
2. admits waiting requests to the free slots and prefills their prompts in one call,
3. advances every running sequence by one token in another call,

and after each call chooses the next tokens, hands them to the clients and lets go of the sequences that ended. Policy
is :mod:`~blipstream.decoding.scheduler`'s, rows are :mod:`~blipstream.decoding.slots`', tokens
:mod:`~blipstream.decoding.sampler`'s, and a request's own state :mod:`~blipstream.decoding.generation`'s. The loop
alone calls the decoder, from one thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from blipstream.decoding.generation import Generation, GenerationLimits
from blipstream.decoding.logits import Logits
from blipstream.decoding.observer import GuardedObserver, LoopObserver, StepReport
from blipstream.decoding.request import Decoder, GenerationRequest
from blipstream.decoding.sampler import choose_tokens
from blipstream.decoding.scheduler import Scheduler
from blipstream.decoding.slots import SlotTable
from blipstream.decoding.text import Tokenizer
from blipstream.errors import BlipstreamError, EngineError, ServerBusyError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """Limits and intervals of the decode loop."""

    max_waiting: int = 256
    """Requests that may wait for a slot; further ones are refused."""
    prefill_budget: int = 512
    """Tokens (padding included) that one iteration prefills at most, unless a single prompt is longer."""
    running_poll_s: float = 0.0
    """Seconds between two looks at whether the running sequences are cancelled; 0 looks before every step."""
    waiting_poll_s: float = 0.1
    """The same for waiting requests, which hold no slot and may be many."""


class DecodeLoop:
    """Serves generation requests on one decoder.

    Every accepted request gets exactly one last chunk, whatever happens: its tokens run out, the client cancels, its
    callback fails, the engine fails, the loop is closed.

    Args:
        decoder: the language model with its KV cache.
        tokenizer: its tokenizer.
        eos_token_ids: tokens that end a sequence.
        image_token_id: placeholder that stands for each soft token where the prompt's ids matter (repetition
            penalty, bad words), as in transformers; None leaves the soft tokens out.
        config: limits and intervals.
        observer: is told what happens.
        clock: seconds; the clock of ``GenerationRequest.start_by`` and ``arrived_at``.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Collection[int],
        image_token_id: int | None = None,
        config: LoopConfig | None = None,
        observer: LoopObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or LoopConfig()
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._limits = GenerationLimits(
            vocab_size=decoder.vocab_size,
            max_tokens=decoder.max_tokens,
            max_prompt_tokens=decoder.max_prompt_tokens,
            decoder_start_token_id=decoder.decoder_start_token_id,
            eos_token_ids=frozenset(eos_token_ids),
            image_token_id=image_token_id,
        )
        self._observer = GuardedObserver(observer or LoopObserver())
        self._clock = clock
        self._slots: SlotTable[Generation] = SlotTable(decoder.max_sequences)
        self._scheduler: Scheduler[Generation] = Scheduler(config.max_waiting, config.prefill_budget)
        self._running_poll = _Interval(config.running_poll_s)
        self._waiting_poll = _Interval(config.waiting_poll_s)
        self._changed = threading.Condition()  # guards the scheduler and the flags; the rest is the loop's thread's
        self._closing = False
        self._abandoning = False
        self._thread: threading.Thread | None = None

    # --- for any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        """Accept a request; its chunks arrive by ``request.on_chunk``, on the loop's thread.

        A ``max_tokens`` for which the KV cache's row has no room is cut to the room there is; the sequence then ends
        with ``FinishReason.LENGTH``, as at any other limit.

        Raises:
            PromptTooLongError: the prompt is longer than what can be read, or leaves no room for a generated token.
            InvalidRequestError: the prompt is empty, or holds ids that are no tokens.
            ServerBusyError: the queue is full, or the loop is closing.
        """
        generation = Generation(request, self._tokenizer, self._limits, self._observer, self._clock)
        with self._changed:
            if self._closing:
                raise ServerBusyError("the server is shutting down and takes no more requests")
            self._scheduler.add(generation)
            self._changed.notify()

    def start(self) -> None:
        """Run the loop on a thread of its own until :meth:`close`. It sleeps while there is nothing to do."""
        if self._thread is not None:
            raise RuntimeError("the decode loop has been started already")
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)
        self._thread.start()

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, end those at hand, and stop the thread. Not to be called from ``on_chunk``.

        Args:
            drain: generate what was accepted to its end; otherwise cancel it.
        """
        with self._changed:
            self._closing = True
            self._abandoning = self._abandoning or not drain
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self._has_work():
                self.step()

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._slots)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._scheduler)

    # --- for the loop's thread ---------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One iteration: schedule, run, postprocess. Return whether there is more to do.

        For tests and for callers that drive the loop themselves; never beside a started thread.
        """
        started = self._clock()
        report = StepReport()
        self._drop_cancelled()
        self._prefill(self._schedule(), report)
        self._decode(report)
        report.running, report.waiting = self.num_running, self.num_waiting
        report.seconds = self._clock() - started
        self._observer.on_step(report)
        return self._has_work()

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` unless slots, rows and queue fit together. Between two iterations only."""
        self._slots.check_integrity()
        for generation in self._slots.items:
            if generation.ended or not generation.token_ids:
                raise AssertionError(f"request {generation.request.request_id} holds a slot and does not run")
            if generation.num_cached_tokens >= self._decoder.max_tokens:
                raise AssertionError(f"request {generation.request.request_id} has outgrown its row")
        for generation in self._scheduler.waiting:
            if generation.ended or generation.token_ids:
                raise AssertionError(f"request {generation.request.request_id} waits, but has started or ended")

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self.step()
            except Exception as error:  # a fault of the loop itself: nobody may wait for ever because of it
                _log.exception("the decode loop failed")
                self._fail_all(EngineError(f"the decode loop failed: {error!r}"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._has_work())
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(len(self._slots) or len(self._scheduler))

    def _drop_cancelled(self) -> None:
        """End the running sequences whose clients cancelled, and mark the waiting ones."""
        now = self._clock()
        running = self._slots.items
        with self._changed:
            waiting = self._scheduler.waiting
        for generation in (*running, *waiting) if self._abandoning else ():
            generation.cancelled = True
        for generation in running if self._running_poll.is_due(now) else ():
            generation.poll()
        for generation in waiting if self._waiting_poll.is_due(now) else ():
            generation.poll()
        for generation in running:
            if generation.cancelled:
                generation.cancel()
        self._release_ended()

    def _schedule(self) -> list[Generation]:
        """End the waiting requests that are cancelled or expired; return those to prefill now."""
        with self._changed:
            decision = self._scheduler.schedule(self._slots.free, self._clock())
        for generation, error in decision.expired:
            generation.fail(error)
        for generation in decision.admitted:
            generation.poll()
        for generation in (*decision.cancelled, *decision.admitted):
            if generation.cancelled:
                generation.cancel()
        return [generation for generation in decision.admitted if not generation.ended]

    def _prefill(self, admitted: Sequence[Generation], report: StepReport) -> None:
        """Fill the rows behind the running ones with the prompts, and generate the first token of each."""
        if not admitted:
            return
        started = self._clock()
        try:
            with _engine_errors():
                logits = self._decoder.prefill(
                    len(self._slots), [generation.request.prompt for generation in admitted]
                )  # (B, V)
        except BlipstreamError as error:
            self._prefill_failed(admitted, error, report)
            return
        report.prefill_seconds += self._clock() - started
        for generation in admitted:
            self._slots.append(generation)
            self._observer.on_start(started - generation.arrived_at)
            report.prefill_tokens += generation.num_prompt_tokens
        self._postprocess(admitted, logits, report)

    def _prefill_failed(self, admitted: Sequence[Generation], error: BlipstreamError, report: StepReport) -> None:
        """Prefill again one by one, so that a prompt at fault does not take its neighbours along."""
        if len(admitted) == 1:
            admitted[0].fail(error)
            return
        _log.warning("a prefill of %d prompts failed and is repeated one by one: %s", len(admitted), error)
        for generation in admitted:
            self._prefill([generation], report)

    def _decode(self, report: StepReport) -> None:
        """Append each running sequence's newest token to its row, and generate the next."""
        running = self._slots.items
        if not running:
            return
        token_ids = np.array([generation.token_ids[-1] for generation in running], np.int64)  # (n,)
        lengths = np.array([generation.num_cached_tokens for generation in running], np.int64)  # (n,)
        started = self._clock()
        try:
            with _engine_errors():
                logits = self._decoder.decode(token_ids, lengths)  # (n, V)
        except BlipstreamError as error:  # the rows' contents are undefined now: nobody can go on
            for generation in running:
                generation.fail(error)
            self._release_ended()
            return
        report.decode_seconds += self._clock() - started
        self._postprocess(running, logits, report)

    def _postprocess(self, generations: Sequence[Generation], logits: Logits, report: StepReport) -> None:
        """Choose the next token of each sequence from its logits (B, V), and let go of the sequences that end."""
        choices = choose_tokens(logits, [generation.chooser for generation in generations])
        for generation, choice in zip(generations, choices, strict=True):
            if isinstance(choice, BlipstreamError):
                generation.fail(choice)
            else:
                generation.append(choice)
                report.generated_tokens += 1
        self._release_ended()

    def _release_ended(self) -> None:
        """Free the slots of the sequences that ended; the last rows move into the gaps."""
        ended = [row for row, generation in enumerate(self._slots.items) if generation.ended]
        for move in self._slots.release(ended):
            self._decoder.move_row(move.source, move.target, self._slots.items[move.target].num_cached_tokens)

    def _fail_all(self, error: BlipstreamError) -> None:
        with self._changed:
            waiting = self._scheduler.clear()
        for generation in (*self._slots.items, *waiting):
            if not generation.ended:
                generation.fail(error)
        self._slots.release(range(len(self._slots)))


class _Interval:
    """Says whether something that recurs is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether the interval has passed since this last said yes."""
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


@contextmanager
def _engine_errors() -> Iterator[None]:
    """Raise whatever a decoder fails with as an :class:`~blipstream.errors.EngineError`."""
    try:
        yield
    except BlipstreamError:
        raise
    except Exception as error:
        raise EngineError(f"the decoder failed: {error!r}") from error
