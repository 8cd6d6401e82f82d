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
_ROUNDS = (5, 50)
_LEAST_S = 0.1
"""Short runs are repeated for so long, within the rounds above."""
_OVERLAP_S = 1.0
"""Seconds at least for which images are read beside decode steps, to see what is lost."""

Progress = Callable[[str], None]


def measure_stages(folder: Path, *, threads: int | None = None, on_stage: Progress) -> StageTimes:
    """Time every stage several times and take the medians.

    Args:
        folder: of a bundle.
        threads: of each engine; all cores by default.
        on_stage: is told what is measured.

    Raises:
        BlipstreamError: it is no bundle, or its engines do not run here.
    """
    with Bundle(folder, threads or len(os.sched_getaffinity(0))) as model:
        clock, decoder, side = _Clock(), model.decoder, model.manifest.image.size
        at_once = model.manifest.preferred_images
        pixels: Floats = np.random.default_rng(0).normal(0, 1, (at_once, 3, side, side)).astype(np.float32)
        on_stage("images")
        batches = [count for count in _IMAGES if count <= at_once]
        images = [(float(count), clock.median(partial(_read, model, pixels[:count]))) for count in batches]
        soft_tokens = model.read(model.see(pixels[:1]))
        prefill, step = [], []
        for count in (rows for rows in _ROWS if rows <= decoder.max_sequences):
            on_stage(f"prefill and decode step, {count} at once")
            prompts = model.prompts(np.repeat(soft_tokens, count, axis=0))
            tokens = np.full(count, prompts[0].token_ids[0], np.int64)
            lengths = model.lengths(prompts)
            total = float(sum(prompt.num_tokens for prompt in prompts))
            prefill.append((total, clock.median(partial(decoder.prefill, 0, prompts))))
            step.append((float(count), clock.median(partial(decoder.decode, tokens, lengths))))
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
            max_prompt_tokens=model.manifest.decoder.max_prompt_tokens,
            max_tokens=decoder.max_tokens,
            answer_apart=model.manifest.decoder.encoder is not None,
            fastest=clock.fastest / clock.medians,
            slowest=clock.slowest / clock.medians,
            others=clock.others(),
        )


def _read(model: Bundle, pixels: Floats) -> Floats:
    return model.read(model.see(pixels))


class _Clock:
    """Takes medians, and remembers how far the rounds were apart and what else ran on the machine."""

    def __init__(self) -> None:
        self.medians = self.fastest = self.slowest = 0.0
        self._started = (time.perf_counter(), _busy_s(), time.process_time())

    def median(self, run: Callable[[], object]) -> float:
        """Seconds of a run, after one that is not counted."""
        run()
        seconds: list[float] = []
        while len(seconds) < _ROUNDS[0] or (len(seconds) < _ROUNDS[1] and sum(seconds) < _LEAST_S):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        self.fastest += min(seconds)
        self.slowest += max(seconds)
        self.medians += statistics.median(seconds)
        return statistics.median(seconds)

    def others(self) -> float:
        """Cores that other programs have kept busy since this clock was made."""
        elapsed, busy, own = (
            now - then
            for now, then in zip((time.perf_counter(), _busy_s(), time.process_time()), self._started, strict=True)
        )
        return max(0.0, (busy - own) / elapsed)


def _busy_s() -> float:
    """Seconds for which all cores together have computed; 0 where nobody says."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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
