"""Building a full-size bundle as a user would, and one caption at a time from it and from transformers."""

from __future__ import annotations

import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from blipstream_client import Client
from PIL import Image

from benchmarks.rows import Setting
from benchmarks.setting import make_setting
from blipstream.triton.server import TritonServer

TOKENS = 20
"""Tokens of a caption, neither more nor less."""
_PNG_SIDE = 480


@dataclass(frozen=True)
class Built:
    """What a build took."""

    seconds: float
    peak_bytes: int
    """Largest resident set of the process."""
    printed: str


def build(folder: Path, bundle: Path, precision: str, *options: str) -> Built:
    """Run ``blipstream build``, with further options of its command line.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    program = Path(sys.executable).with_name("blipstream")
    command = [program, "build", folder, "-o", bundle, "--precision", precision, "--force", *options]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "120"})
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Built(seconds, peak, done.stdout)


def bundle_bytes(bundle: Path) -> int:
    """What a bundle takes on disk."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def images(count: int) -> list[Image.Image]:
    """Different images of coarse colours."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(patch).resize((_PNG_SIDE, _PNG_SIDE), Image.Resampling.BICUBIC) for patch in patches]


@dataclass(frozen=True)
class Captions:
    """Captions of one system, one after the other."""

    seconds: tuple[float, ...]
    memory_bytes: int
    """Resident, of all its processes, afterwards."""
    token_ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        lengths = sorted({len(ids) for ids in self.token_ids})
        if lengths != [TOKENS]:
            raise ValueError(f"captions must have {TOKENS} tokens each, but they have {lengths}")

    @property
    def median(self) -> float:
        """Seconds of a caption."""
        return statistics.median(self.seconds)


def serve(
    bundle: Path, count: int, checkpoint: Path, threads: int, command: str, load_average: float
) -> tuple[Captions, float, Setting]:
    """Caption ``count`` images over gRPC after one that is not counted.

    The captions, seconds until the server was ready, and the setting of the run (:func:`make_setting`).
    """
    seconds, tokens = [], []
    started = time.perf_counter()
    with TritonServer(bundle) as server, Client(server.grpc_url, timeout=600) as client:
        ready = time.perf_counter() - started
        setting = make_setting(server, checkpoint, threads, command, load_average)
        for image in images(count + 1):
            file = io.BytesIO()
            image.save(file, "PNG")
            sent = time.perf_counter()
            chunks = list(client.stream(file.getvalue(), "", max_tokens=TOKENS, min_tokens=TOKENS))
            seconds.append(time.perf_counter() - sent)
            tokens.append(tuple(token for chunk in chunks for token in chunk.token_ids))
        memory = sum(map(resident, psutil.Process().children()))
    return Captions(tuple(seconds[1:]), memory, tuple(tokens[1:])), ready, setting


def resident(parent: psutil.Process) -> int:
    """Bytes of a process and of all that it has started, shared pages once."""
    return sum(process.memory_full_info().pss for process in (parent, *parent.children(recursive=True)))


def generate(folder: Path, dtype: str, count: int, threads: int) -> Captions:
    """The same by transformers, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fullsize.peer", str(folder), dtype, str(count), str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Captions(tuple(found["seconds"]), found["memory"], tuple(map(tuple, found["token_ids"])))


def agreement(ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> float:
    """Share of the tokens that are the same, up to the first that differs in each caption."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(b)
        same += next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), len(b))
    return same / total
