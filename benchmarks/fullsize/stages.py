"""How long each stage of a bundle takes by itself, and what share of the memory's bandwidth a decode step reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from blipstream.contract import BLIP2, DECODER_FILE, MODEL_VERSION
from blipstream.planning.engines import Bundle, Floats

READ = "memory"
"""The stage that only reads memory."""
PREFILL = "prefill"
STEP = "step"
ROWS = (1, 2, 4, 8, 16)
"""Sequences of a prefill and of a decode step."""
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_READ_BYTES = 1 << 30
"""Far more than any cache holds."""


@dataclass(frozen=True)
class Timing:
    """One stage at one batch size."""

    stage: str
    rows: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Stage:
    """Something that is timed in every round."""

    name: str
    rows: int
    run: Callable[[], object]


def time_stages(folder: Path, threads: int, rounds: int, rows: Sequence[int] = ROWS) -> list[Timing]:
    """Time every stage once a round, so that what disturbs a round disturbs all of them.

    Args:
        folder: of the bundle.
        threads: of each engine.
        rounds: after one that is not counted.
        rows: sequences of prefills and steps, as far as the bundle has slots.
    """
    with Bundle(folder, threads) as model:
        stages = list(_stages(model, threads, rows))
        taken: list[list[float]] = [[] for _ in stages]
        for _ in range(rounds + 1):
            for stage, seconds in zip(stages, taken, strict=True):
                started = time.perf_counter()
                stage.run()
                seconds.append(time.perf_counter() - started)
    return [Timing(stage.name, stage.rows, tuple(own[1:])) for stage, own in zip(stages, taken, strict=True)]


def bandwidth(timings: Sequence[Timing]) -> float:
    """Bytes per second that the memory gives to all threads together, reading one after the other."""
    return _READ_BYTES / _reading(timings).median


def bandwidth_share(timing: Timing, num_bytes: int, timings: Sequence[Timing]) -> float:
    """The bandwidth that a stage reaches over the memory's in the same round: median of the rounds.

    Args:
        timing: of the stage.
        num_bytes: that it reads.
        timings: all of the run.
    """
    rounds = zip(_reading(timings).seconds, timing.seconds, strict=True)
    return num_bytes / _READ_BYTES * statistics.median(read / own for read, own in rounds)


def _reading(timings: Sequence[Timing]) -> Timing:
    (read,) = (timing for timing in timings if timing.stage == READ)
    return read


def step_bytes(folder: Path) -> int:
    """Bytes of the weights that a decode step reads: what its matrix products take in of the graph's own tensors.

    Tables of which a step looks up single rows do not count, unless they are the head as well.
    """
    graph = onnx.load(folder / BLIP2 / MODEL_VERSION / DECODER_FILE, load_external_data=False).graph
    tables = {node.input[0] for node in graph.node if node.op_type in _LOOKUPS}
    multiplied = {name for node in graph.node if node.op_type not in _LOOKUPS for name in node.input}
    return sum(_bytes(tensor) for tensor in graph.initializer if tensor.name not in tables - multiplied)


def _stages(model: Bundle, threads: int, rows: Sequence[int]) -> Iterator[Stage]:
    memory = torch.ones(_READ_BYTES // 4)
    torch.set_num_threads(threads)
    yield Stage(READ, 0, memory.sum)
    side, decoder = model.manifest.image.size, model.decoder
    image: Floats = np.random.default_rng(0).normal(0, 1, (1, 3, side, side)).astype(np.float32)
    embeds = model.see(image)
    soft_tokens = model.read(embeds)
    yield Stage("vision_encoder", 1, lambda: model.see(image))
    yield Stage("qformer", 1, lambda: model.read(embeds))
    for count in (count for count in rows if count <= decoder.max_sequences):
        prompts = model.prompts(np.repeat(soft_tokens, count, axis=0))
        lengths = model.lengths(prompts)
        tokens = np.full(count, model.manifest.generation.empty_prompt_ids[0], np.int64)
        yield Stage(PREFILL, count, lambda prompts=prompts: decoder.prefill(0, prompts))  # type: ignore[misc]
        yield Stage(STEP, count, lambda t=tokens, n=lengths: decoder.decode(t, n))  # type: ignore[misc]


def _bytes(tensor: onnx.TensorProto) -> int:
    size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * size
