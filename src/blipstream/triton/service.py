"""The service behind ``blip2``: check a request, get its image features, hand it to the decode loop, answer.

It sees requests as :class:`~blipstream.triton.calls.Call` and runs without Triton in tests. Its threads, each with one
owner: an asyncio event loop on which requests wait for their features, workers that block on behalf of it, the decode
loop, the response writer and the cancellation watch. :meth:`GenerationService.accept` never blocks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from blipstream.config import ServerConfig
from blipstream.decoding.loop import DecodeLoop
from blipstream.decoding.request import Chunk, GenerationRequest, Prompt, SamplingParams
from blipstream.decoding.text import Tokenizer
from blipstream.errors import (
    BlipstreamError,
    EngineError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerBusyError,
)
from blipstream.features import Features, ImageFeatures, SoftTokenSource
from blipstream.triton.calls import Call
from blipstream.triton.cancellation import CancellationWatch
from blipstream.triton.inputs import ImageSource, ParsedRequest, RequestParser
from blipstream.triton.metrics import ServingMetrics
from blipstream.triton.parameters import CALL_PARAMETER
from blipstream.triton.session import ResponseWriter, Session

_log = logging.getLogger(__name__)

T = TypeVar("T")

_PARSING_THREADS = 2
_FEATURE_THREADS = 64
"""Images whose features are computed at once: enough to fill the batches of each model that is involved."""

_SHUTTING_DOWN = "the server is shutting down"
_LAST_RESPONSES_S = 5.0
"""Time that Triton has to take the last responses when the server stops."""

_OUTCOMES: dict[type[BlipstreamError], str] = {
    InvalidRequestError: "invalid",
    ServerBusyError: "busy",
    RequestTimeoutError: "timeout",
}


class ImageReader(Protocol):
    """Runs the models that read images; each method blocks until they have answered."""

    def soft_tokens(self, image: ImageSource) -> Features:
        """Soft tokens (Q, D) of an image."""
        ...

    def features(self, image: ImageSource, instruction: Sequence[int]) -> ImageFeatures:
        """Soft tokens of an image and an instruction, and what another instruction about the image needs."""
        ...

    def soft_tokens_of(self, image_embeds: Features, instruction: Sequence[int]) -> Features:
        """Soft tokens (Q, D) of another instruction about an image."""
        ...


@dataclass(frozen=True)
class _TokenizedTexts:
    prompt: tuple[int, ...]
    bad_words: list[tuple[int, ...]]


class GenerationService:
    """Serves calls until it is closed.

    Args:
        parser: checks inputs.
        tokenizer: the language model's.
        empty_prompt_ids: stand for a request's text when there is none.
        images: reads the images.
        make_loop: makes the decode loop that reports to the given observer.
        config: queue size, timeouts, cache budget.
        capacity: sequences that run at once.
    """

    def __init__(
        self,
        parser: RequestParser,
        tokenizer: Tokenizer,
        empty_prompt_ids: tuple[int, ...],
        images: ImageReader,
        make_loop: Callable[[ServingMetrics], DecodeLoop],
        config: ServerConfig,
        capacity: int,
    ) -> None:
        self.metrics = ServingMetrics()
        self._parser = parser
        self._tokenizer = tokenizer
        self._empty_prompt_ids = empty_prompt_ids
        self._images = images
        self._config = config
        self._limit = config.queue_size + capacity
        self._features = SoftTokenSource(config.cache_bytes)
        self._decode_loop = make_loop(self.metrics)
        self._writer = ResponseWriter()
        self._watch = CancellationWatch[Session](self._on_cancel)
        self._parsers = ThreadPoolExecutor(_PARSING_THREADS, "request-parser")
        self._workers = ThreadPoolExecutor(_FEATURE_THREADS, "feature-worker")
        self._events = asyncio.new_event_loop()
        self._events_thread = threading.Thread(target=self._events.run_forever, name="requests", daemon=True)
        self._changed = threading.Condition()  # guards what follows
        self._live: set[Session] = set()
        self._named: dict[str, Session] = {}
        self._closing = False
        self._closed = False

    def start(self) -> None:
        """Start the threads."""
        self._events_thread.start()
        self._decode_loop.start()
        self._writer.start()
        self._watch.start()

    def accept(self, call: Call) -> None:
        """Take a call; it gets exactly one final response, whatever happens."""
        session = Session(call, self._writer, self._on_end)
        with self._changed:
            refusal = self._refusal(call)
            if refusal is None:
                self._live.add(session)
                if call.name:
                    self._named[call.name] = session
                asyncio.run_coroutine_threadsafe(self._serve(session), self._events)
        if refusal is None:
            self._watch.add(session)
        else:
            call.fail(refusal)
            self._count(call, outcome_of(refusal))

    def cancel(self, name: str) -> bool:
        """Cancel the call of that name; whether there is one at hand."""
        with self._changed:
            session = self._named.get(name)
        if session is not None:
            self._on_cancel(session)
        return session is not None

    def gauges(self) -> dict[str, float]:
        """Values of the metrics that are kept elsewhere."""
        running = self._decode_loop.num_running
        with self._changed:
            waiting = max(0, len(self._live) - running)
        return {
            "feature_cache_hits_total": self._features.num_hits,
            "feature_cache_misses_total": self._features.num_misses,
            "feature_cache_embeds_hits_total": self._features.num_embeds_hits,
            "feature_cache_bytes": self._features.num_bytes,
            "running_sequences": running,
            "waiting_requests": waiting,
        }

    def close(self, grace: float = 0.0) -> None:
        """Take no more calls, answer those at hand, and stop every thread. Further calls of this only wait for that.

        Args:
            grace: seconds that running sequences have to end; waiting requests are answered at once.
        """
        with self._changed:
            if self._closing:
                self._changed.wait_for(lambda: self._closed)
                return
            self._closing = True
        self._withdraw_all(waiting_only=True)
        self._wait_until_empty(grace)
        self._withdraw_all()
        self._decode_loop.close(drain=False)
        self._wait_until_empty(_LAST_RESPONSES_S)
        self._stop_threads()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- one call ----------------------------------------------------------------------------------------------------

    async def _serve(self, session: Session) -> None:
        """Bring a call to the decode loop. On the event loop's thread."""
        call = session.call
        session.task = asyncio.current_task()
        try:
            if session.cancelled:  # before there was a task to cancel
                raise asyncio.CancelledError
            parsed, texts = await self._on(self._parsers, lambda: self._parse(call))
            session.stream = parsed.stream
            session.prefix = parsed.text if parsed.echo else ""
            soft_tokens = await self._wait_for_features(call, parsed)
            self._decode_loop.submit(self._request(session, parsed.params, texts, soft_tokens))
        except asyncio.CancelledError:
            session.cancel()
        except BlipstreamError as error:
            session.fail(error)
        except Exception as error:
            _log.exception("request %s failed", call.request_id)
            session.fail(EngineError(f"an internal error occurred: {error!r}"))
        finally:
            session.task = None

    def _parse(self, call: Call) -> tuple[ParsedRequest, _TokenizedTexts]:
        """On a parser's thread."""
        parsed = self._parser.parse(call.inputs(), call.parameters)
        token_ids = self._tokenizer.encode(parsed.text) if parsed.text else self._empty_prompt_ids
        return parsed, _TokenizedTexts(token_ids, self._tokenizer.word_sequences(parsed.params.bad_words))

    async def _soft_tokens(self, parsed: ParsedRequest) -> Features:
        """Soft tokens (F * Q, D) of a request's F images, one image's behind the other's."""
        found = await asyncio.gather(*(self._read(image, parsed.instruction) for image in parsed.images))
        return found[0] if len(found) == 1 else np.concatenate(found)

    async def _read(self, image: ImageSource, instruction: tuple[int, ...] | None) -> Features:
        """Soft tokens (Q, D) of an image, and of an instruction where the Q-Former reads it."""
        images = self._images
        if instruction is None:
            return await self._features.get(
                image.key, lambda: self._on(self._workers, lambda: images.soft_tokens(image))
            )
        return await self._features.get_instructed(
            image.key,
            instruction,
            lambda: self._on(self._workers, lambda: images.features(image, instruction)),
            lambda embeds: self._on(self._workers, lambda: images.soft_tokens_of(embeds, instruction)),
        )

    async def _wait_for_features(self, call: Call, parsed: ParsedRequest) -> Features:
        """The soft tokens, if they come before the call's time is up."""
        start_by = self._start_by(call)
        left = None if start_by is None else start_by - time.monotonic()
        try:
            return await asyncio.wait_for(self._soft_tokens(parsed), left)
        except asyncio.TimeoutError:
            raise RequestTimeoutError(
                f"the request waited {time.monotonic() - call.arrived_at:.3f} s for its image features, and its "
                f"timeout is {self._timeout(call):.3f} s"
            ) from None

    def _request(
        self, session: Session, params: SamplingParams, texts: _TokenizedTexts, soft_tokens: Features
    ) -> GenerationRequest:
        return GenerationRequest(
            request_id=session.call.request_id,
            prompt=Prompt(soft_tokens, texts.prompt),
            params=params,
            bad_word_ids=texts.bad_words,
            on_chunk=session.on_chunk,
            is_cancelled=lambda: session.cancelled,
            start_by=self._start_by(session.call),
            arrived_at=session.call.arrived_at,
        )

    def _timeout(self, call: Call) -> float:
        return call.timeout or self._config.request_timeout

    def _start_by(self, call: Call) -> float | None:
        return call.arrived_at + self._timeout(call) if self._timeout(call) else None

    def _on(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> asyncio.Future[T]:
        return self._events.run_in_executor(pool, work)

    # --- the ends of calls -------------------------------------------------------------------------------------------

    def _refusal(self, call: Call) -> BlipstreamError | None:
        if self._closing:
            return ServerBusyError(_SHUTTING_DOWN)
        if len(self._live) >= self._limit:
            return ServerBusyError(f"the queue is full: {len(self._live)} requests are running or waiting")
        if call.name in self._named:
            return InvalidRequestError(f"{CALL_PARAMETER} must be a new name, but another request has this one")
        return None

    def _on_cancel(self, session: Session) -> None:
        """The client has cancelled. On the watch's thread."""
        session.withdraw()
        self._events.call_soon_threadsafe(session.cancel_task)

    def _on_end(self, session: Session, last: Chunk) -> None:
        """A call's final response was sent. On the writer's thread."""
        reason = last.finish_reason.value if last.finish_reason is not None else outcome_of(last.error)
        self._count(session.call, reason)
        self._watch.discard(session)
        with self._changed:
            self._live.discard(session)
            self._named.pop(session.call.name, None)
            self._changed.notify_all()

    def _count(self, call: Call, outcome: str) -> None:
        self.metrics.on_outcome(outcome, time.monotonic() - call.arrived_at)

    def _withdraw_all(self, *, waiting_only: bool = False) -> None:
        """Let the calls at hand end because the server stops; where they wait for features, now."""
        with self._changed:
            live = [session for session in self._live if not (waiting_only and session.started)]
        for session in live:
            session.withdraw(ServerBusyError(_SHUTTING_DOWN))
            self._events.call_soon_threadsafe(session.cancel_task)

    def _wait_until_empty(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._live, timeout)

    def _stop_threads(self) -> None:
        self._watch.close()
        self._writer.close()
        asyncio.run_coroutine_threadsafe(_cancel_tasks(), self._events).result()
        self._events.call_soon_threadsafe(self._events.stop)
        self._events_thread.join()
        self._events.close()
        self._parsers.shutdown()
        self._workers.shutdown(wait=False)  # a model that hangs must not keep the server from stopping


async def _cancel_tasks() -> None:
    """Cancel what the event loop still runs, and wait for it."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def outcome_of(error: BlipstreamError | None) -> str:
    """The outcome, in the metrics, of a request that ended with an error."""
    for kind, outcome in _OUTCOMES.items():
        if isinstance(error, kind):
            return outcome
    return "error"
