"""Measuring the stages of a bundle on this machine, without a server."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from blipstream.config import ServerConfig
from blipstream.planning.engines import Bundle, Floats
from blipstream.planning.stages import StageTimes

_ROWS = (1, 2, 4, 8, 16, 32)
_IMAGES = (1, 2, 4, 8)
_OVERLAP_S = 1.0
"""Seconds at least for which images are read beside decode steps, to see what is lost."""

Progress = Callable[[str], None]


def measure_stages(folder: Path, *, threads: int | None = None, rounds: int = 5, on_stage: Progress) -> StageTimes:
    """Time every stage ``rounds`` times and take the medians.

    Args:
        folder: of a bundle.
        threads: of each engine; all cores by default.
        rounds: after one that is not counted.
        on_stage: is told what is measured.

    Raises:
        BlipstreamError: it is no bundle, or its engines do not run here.
    """
    with Bundle(folder, threads or len(os.sched_getaffinity(0))) as model:
        decoder, side = model.decoder, model.manifest.image.size
        at_once = model.manifest.preferred_images
        pixels: Floats = np.random.default_rng(0).normal(0, 1, (at_once, 3, side, side)).astype(np.float32)
        on_stage("images")
        batches = [count for count in _IMAGES if count <= at_once]
        images = [(float(count), _median(partial(_read, model, pixels[:count]), rounds)) for count in batches]
        soft_tokens = model.read(model.see(pixels[:1]))
        prefill, step = [], []
        for count in (rows for rows in _ROWS if rows <= decoder.max_sequences):
            on_stage(f"prefill and decode step, {count} at once")
            prompts = model.prompts(np.repeat(soft_tokens, count, axis=0))
            tokens = np.full(count, prompts[0].token_ids[0], np.int64)
            lengths = model.lengths(prompts)
            total = float(sum(prompt.num_tokens for prompt in prompts))
            prefill.append((total, _median(partial(decoder.prefill, 0, prompts), rounds)))
            step.append((float(count), _median(partial(decoder.decode, tokens, lengths), rounds)))
        on_stage("images beside decode steps")
        see, decode = partial(_read, model, pixels[:1]), partial(decoder.decode, tokens[:1], lengths[:1])
        overlap = _overlap(see, images[0][1], decode, step[0][1])
        return StageTimes(
            images,
            prefill,
            step,
            overlap=overlap,
            max_images=at_once,
            max_sequences=decoder.max_sequences,
            prefill_budget=ServerConfig().prefill_budget,
            image_tokens=len(soft_tokens[0]),
        )


def _read(model: Bundle, pixels: Floats) -> Floats:
    return model.read(model.see(pixels))


def _median(run: Callable[[], object], rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _overlap(see: Callable[[], object], see_s: float, step: Callable[[], object], step_s: float) -> float:
    """Work that is done in a second while both run, over what is done in a second when they take turns."""
    over = threading.Event()
    times = max(2, math.ceil(_OVERLAP_S / see_s))

    def images() -> None:
        for _ in range(times):
            see()
        over.set()

    beside = threading.Thread(target=images)
    started, steps = time.perf_counter(), 0
    beside.start()
    while not over.is_set():
        step()
        steps += 1
    beside.join()
    return (times * see_s + steps * step_s) / (time.perf_counter() - started)
