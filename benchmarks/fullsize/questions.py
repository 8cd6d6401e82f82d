"""Questions about an image, one after the other: what a further one costs, and what the server adds to its engines.

The engines' own time is what Triton's statistics say of the two image models' and what the decode loop counts of its
engine's; between them and a client's latency lie gRPC, the ensemble, the decode loop, streaming and the client itself.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from blipstream_client import Client

from benchmarks.fullsize.measure import TOKENS, images
from blipstream.bench.meter import Meter
from blipstream.contract import QFORMER, VISION_ENCODER
from blipstream.triton.server import TritonServer

QUESTIONS = ("what is it", "how many ?")
"""Each of 11 tokens, as many as OPT's own tokenizer makes of a question: that of a random checkpoint has one a byte."""
ANSWER_TOKENS = 2
"""Of a short answer: a word and the end token."""
_SETTLE_S = 1.0
"""Longer than the time between two publications of the metrics."""


@dataclass(frozen=True)
class Questions:
    """Medians over several images, in seconds."""

    first: float
    """Latency of the first question about an image."""
    second: float
    """Of another question about it."""
    caption: float
    """Of a caption of 20 tokens of a new image."""
    caption_engines: float
    """The engines' own share of it, over all captions together."""


def ask(server: TritonServer, count: int) -> Questions:
    """Ask two questions about each of ``count`` images and caption as many others, after one that is not counted."""
    files = [_png(image) for image in images(2 * count + 2)]
    with Client(server.grpc_url, timeout=600) as client:

        def latency(file: bytes, prompt: str, tokens: int) -> float:
            started = time.perf_counter()
            for _ in client.stream(file, prompt, max_tokens=tokens, min_tokens=tokens):
                pass
            return time.perf_counter() - started

        asked = [[latency(file, question, ANSWER_TOKENS) for question in QUESTIONS] for file in files[: count + 1]][1:]
        latency(files[count + 1], "", TOKENS)
        before = _engine_seconds(server)
        captions = [latency(file, "", TOKENS) for file in files[count + 2 :]]
        engines = _engine_seconds(server) - before
    median: Callable[[list[float]], float] = statistics.median
    share = engines / sum(captions)
    first, second = (median([pair[i] for pair in asked]) for i in range(2))
    return Questions(first, second, median(captions), share * median(captions))


def _engine_seconds(server: TritonServer) -> float:
    """Seconds in which an engine has run, since the server started."""
    time.sleep(_SETTLE_S)
    totals = Meter(server.grpc_url, server.metrics_url).read()
    image_models = sum(totals.models[model].compute_ns for model in (VISION_ENCODER, QFORMER)) / 1e9
    return image_models + totals.counters["prefill_seconds"] + totals.counters["decode_seconds"]


def _png(image: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")  # type: ignore[attr-defined]
    return file.getvalue()
