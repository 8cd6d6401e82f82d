"""What is measured: Blipstream through its client, and transformers behind a queue with one worker.

Requests reach transformers' ``generate`` as they would in a server around it: they wait in a queue, and one worker
takes one (sequential) or as many as wait, up to its batch size (static batches). A batch's requests are all answered
when ``generate`` returns. The first token counts from the moment it leaves the model, which a streamer given to
``generate`` notes; in a static batch that is the moment of the whole batch's first token. No network, no encoding and
no second process lies between these clients and the model, so what is measured favours transformers.
"""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from blipstream_client import Client
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.generation.streamers import BaseStreamer

from benchmarks.harness import Answer, Request

if TYPE_CHECKING:
    from typing_extensions import Self

GATHER_S = 0.002
"""A batch that is not full starts when nobody has joined it for so long, in seconds: the clients of the last batch are
woken one after the other, and without this the first of them would get a batch of its own."""
MAX_TOKENS = 32
"""Tokens of an answer at most, for every system."""
_TIMEOUT_S = 120.0

Generate = Callable[[Sequence[Request]], Sequence[Answer]]


class Blipstream:
    """A running server, over gRPC, streamed; the first token counts from the chunk that brings it."""

    name = "blipstream"

    def __init__(self, url: str) -> None:
        self._client = Client(url, timeout=_TIMEOUT_S)

    def answer(self, request: Request) -> Answer:
        """Stream one answer."""
        first_token_at = 0.0
        tokens: list[int] = []
        with self._client.stream(request.image, request.prompt, max_tokens=MAX_TOKENS) as chunks:
            for chunk in chunks:
                first_token_at = first_token_at or time.perf_counter()
                tokens += chunk.token_ids
        return Answer(tuple(tokens), first_token_at)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class Batching:
    """A queue and one worker, which answers what waits, at most ``batch_size`` requests at once.

    Use it as a context manager: the worker runs within the ``with`` block.
    """

    def __init__(self, name: str, generate: Generate, batch_size: int) -> None:
        self.name = name
        self._generate = generate
        self._batch_size = batch_size
        self._waiting: queue.Queue[tuple[Request, Future[Answer]] | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, name=name)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting.qsize()

    def answer(self, request: Request) -> Answer:
        """Wait in the queue, then for the batch. Raises what ``generate`` raised."""
        future: Future[Answer] = Future()
        self._waiting.put((request, future))
        return future.result()

    def __enter__(self) -> Self:
        self._worker.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._waiting.put(None)
        self._worker.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first, *self._gather()]
            try:
                answers = self._generate([request for request, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _gather(self) -> list[tuple[Request, Future[Answer]]]:
        """Those who join the first of a batch."""
        joined: list[tuple[Request, Future[Answer]]] = []
        while len(joined) < self._batch_size - 1:
            try:
                item = self._waiting.get(timeout=GATHER_S)
            except queue.Empty:
                break
            if item is None:
                self._waiting.put(None)  # for the loop, after this batch
                break
            joined.append(item)
        return joined


class Transformers:
    """The checkpoint in transformers, fp32, on all of torch's threads: a batch of requests in, their answers out."""

    def __init__(self, checkpoint: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._processor = Blip2Processor.from_pretrained(checkpoint)
        eos = self._model.generation_config.eos_token_id
        self._eos = frozenset(eos if isinstance(eos, list) else [eos])

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Decode the images, preprocess, generate greedily, make texts."""
        images = [Image.open(io.BytesIO(request.image)).convert("RGB") for request in requests]
        texts = [request.prompt for request in requests]
        inputs = self._processor(images=images, text=texts, padding=True, return_tensors="pt")
        clock = _FirstToken()
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": MAX_TOKENS}
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **options, streamer=clock)
        new = tokens[:, inputs["input_ids"].shape[1] :]  # (B, T)
        self._processor.batch_decode(new, skip_special_tokens=True)  # a server would send the texts
        return [Answer(self._without_padding(row), clock.first_token_at) for row in new.tolist()]

    def _without_padding(self, tokens: list[int]) -> tuple[int, ...]:
        """The tokens up to the end token, which stays; what follows in a batch is padding."""
        end = next((i for i, token in enumerate(tokens) if token in self._eos), len(tokens) - 1)
        return tuple(tokens[: end + 1])


class _FirstToken(BaseStreamer):
    """Notes when the first token of a batch is out; ``generate`` hands it the prompt first, then each step's tokens."""

    def __init__(self) -> None:
        self.first_token_at = 0.0
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002  # the name is the base class's
        """Count a call; the second brings the first tokens."""
        self._calls += 1
        if self._calls == 2:
            self.first_token_at = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""
