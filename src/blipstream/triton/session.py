"""One request on its way through the server: what has been said to the client, and what is still to be sent."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from blipstream.decoding.request import Chunk, FinishReason
from blipstream.errors import BlipstreamError
from blipstream.triton.calls import Answer, Call

_log = logging.getLogger(__name__)


class Session:
    """Collects the chunks of a call and turns them into responses. Its owner is the service; the writer sends for it.

    Args:
        call: the request.
        writer: sends the responses.
        on_end: is called once, after the final response was sent, with the last chunk.
    """

    def __init__(self, call: Call, writer: ResponseWriter, on_end: Callable[[Session, Chunk], None]) -> None:
        self.call = call
        self.stream = False
        """Whether the client wants each piece of text as it comes; the service sets it when it has read the inputs."""
        self.prefix = ""
        """What the first response's text begins with; the service sets it, too."""
        self.task: asyncio.Task[None] | None = None
        """What brings the call to the decode loop; the service's event loop alone touches it."""
        self.cancelled = False
        """Whether the call is to end before its next token."""
        self.started = False
        """Whether a first token was generated."""
        self._writer = writer
        self._on_end = on_end
        self._lock = threading.Lock()  # guards what follows
        self._pending: list[Chunk] = []
        self._queued = False
        self._ended = False
        self._withdrawal: BlipstreamError | None = None
        self._log_probs_sum = 0.0

    def on_chunk(self, chunk: Chunk) -> None:
        """Take the next chunk; nothing follows the last one. Never blocks."""
        with self._lock:
            if self._ended:
                return
            if chunk.finish_reason is FinishReason.CANCELLED and self._withdrawal is not None:
                chunk = replace(chunk, finish_reason=None, error=self._withdrawal)
            self._ended = chunk.is_last
            self.started = self.started or bool(chunk.token_ids)
            self._pending.append(chunk)
            if self._queued or not (chunk.is_last or (self.stream and chunk.text)):
                return
            self._queued = True
        self._writer.put(self)

    def fail(self, error: BlipstreamError) -> None:
        """End the call with an error, unless it has ended."""
        self.on_chunk(_ending(error=error))

    def cancel(self) -> None:
        """End a call that was cancelled before anything was generated, unless it has ended."""
        self.on_chunk(_ending(finish_reason=FinishReason.CANCELLED))

    def withdraw(self, error: BlipstreamError | None = None) -> None:
        """Let the call end before its next token: as cancelled, or with ``error`` when it is not the client's wish."""
        with self._lock:
            if not self.cancelled:
                self._withdrawal = error
            self.cancelled = True

    def cancel_task(self) -> None:
        """Stop bringing the call to the decode loop. On the service's event loop."""
        if self.task is not None:
            self.task.cancel()

    def is_cancelled(self) -> bool:
        """Ask Triton whether the client has cancelled; takes a fraction of a millisecond."""
        return self.call.is_cancelled()

    def flush(self) -> None:
        """Send what is pending, as one response. On the writer's thread."""
        with self._lock:
            chunks, self._pending = self._pending, []
            self._queued = False
        last = chunks[-1]
        try:
            if last.error is not None:
                self.call.fail(last.error)
            else:
                self.call.send(self._answer(chunks), final=last.is_last)
        except Exception:  # the Python backend's own exceptions: the client cannot be reached
            _log.exception("request %s: a response could not be sent", self.call.request_id)
            self.withdraw()
        if last.is_last:
            self._on_end(self, last)

    def _answer(self, chunks: list[Chunk]) -> Answer:
        last = chunks[-1]
        log_probs = tuple(value for chunk in chunks for value in chunk.log_probs)
        self._log_probs_sum += sum(log_probs)
        prefix, self.prefix = self.prefix, ""
        return Answer(
            text=prefix + "".join(chunk.text for chunk in chunks),
            finish_reason="" if last.finish_reason is None else last.finish_reason.value,
            num_input_tokens=last.num_input_tokens,
            num_output_tokens=last.num_output_tokens,
            token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
            log_probs=log_probs or None,
            cum_log_prob=self._log_probs_sum,
        )


def _ending(*, finish_reason: FinishReason | None = None, error: BlipstreamError | None = None) -> Chunk:
    return Chunk("", (), finish_reason, num_input_tokens=0, num_output_tokens=0, error=error)


class ResponseWriter:
    """One thread that sends responses, so that nobody else waits for Triton to take them.

    Chunks that come while a session waits for its turn go out together: the slower Triton takes responses, the more
    tokens one of them holds.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Session | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="response-writer", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, session: Session) -> None:
        """Send a session's pending chunks soon."""
        self._queue.put(session)

    def close(self) -> None:
        """Send what is queued, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (session := self._queue.get()) is not None:
            try:
                session.flush()
            except Exception:  # the thread serves everyone: a fault of one session must not end it
                _log.exception("a response could not be written")
