"""Many images, one prompt: requests run side by side, answers appear in the order of the images."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blipstream.commands.writers import Writer
from blipstream.errors import BlipstreamError
from blipstream_client import AsyncClient, Generation, TextChunk

STDIN = "-"
"""Stands for the image on standard input."""


@dataclass(frozen=True)
class Task:
    """What is asked about every image."""

    url: str
    prompt: str
    decoding: Mapping[str, Any]
    timeout: float | None
    concurrency: int


@dataclass
class _Transcript:
    """What a request has brought so far, for the one who writes it."""

    name: str
    events: asyncio.Queue[TextChunk | BlipstreamError] = field(default_factory=asyncio.Queue)
    started: float = 0.0
    seconds: float = 0.0


def answer_all(names: Sequence[str], task: Task, writer: Writer) -> int:
    """Send the images and write the answers; returns how many failed. An image that fails leaves the others alone."""
    return asyncio.run(_answer_all(names, task, writer))


async def _answer_all(names: Sequence[str], task: Task, writer: Writer) -> int:
    transcripts = [_Transcript(name) for name in names]
    read_stdin = _Once(sys.stdin.buffer.read)
    free = asyncio.Semaphore(task.concurrency)
    failures = 0
    async with AsyncClient(task.url, timeout=task.timeout) as client:
        ask = partial(_ask, client, task, free, read_stdin)
        running = [asyncio.create_task(ask(transcript)) for transcript in transcripts]
        try:
            for transcript in transcripts:
                failures += not await _write(transcript, writer)
        finally:
            for request in running:
                request.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    return failures


async def _ask(
    client: AsyncClient, task: Task, free: asyncio.Semaphore, read_stdin: _Once, transcript: _Transcript
) -> None:
    async with free:
        transcript.started = time.monotonic()
        try:
            image = await read_stdin() if transcript.name == STDIN else transcript.name
            async with client.stream(image, task.prompt, **task.decoding) as chunks:
                async for chunk in chunks:
                    transcript.seconds = time.monotonic() - transcript.started
                    transcript.events.put_nowait(chunk)
        except BlipstreamError as error:
            transcript.seconds = time.monotonic() - transcript.started
            transcript.events.put_nowait(error)


async def _write(transcript: _Transcript, writer: Writer) -> bool:
    """Write one answer as it comes; returns whether there was one."""
    chunks: list[TextChunk] = []
    while True:
        event = await transcript.events.get()
        if isinstance(event, BlipstreamError):
            writer.error(transcript.name, event, transcript.seconds)
            return False
        chunks.append(event)
        writer.piece(transcript.name, event.text)
        if event.is_last:
            writer.answer(transcript.name, Generation.join(chunks), transcript.seconds)
            return True


class _Once:
    """Reads standard input once, however many ask for it."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self._result: asyncio.Future[bytes] | None = None

    async def __call__(self) -> bytes:
        if self._result is None:
            self._result = asyncio.ensure_future(asyncio.to_thread(self._read))
        return await self._result
