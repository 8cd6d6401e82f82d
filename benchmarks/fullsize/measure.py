"""Building a full-size bundle as a user would, and one caption at a time from it and from transformers."""

from __future__ import annotations

import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from blipstream_client import Client
from PIL import Image

from benchmarks.compare.process import Peer
from benchmarks.compare.tasks import CAPTION
from benchmarks.memory import resident
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


def generate(checkpoint: Path, dtype: str, count: int, threads: int, log: Path) -> Captions:
    """The same by transformers, in a process of its own, of which ``log`` takes what it prints.

    Raises:
        PeerError: it failed.
    """
    seconds, tokens = [], []
    options = [str(checkpoint.resolve()), str(threads), dtype, "eager"]
    command = [sys.executable, "-m", "benchmarks.compare.programs.huggingface", *options]
    with tempfile.TemporaryDirectory() as folder, Peer(command, log, threads) as peer:
        path = Path(folder, "image.png")
        for image in images(count + 1):
            image.save(path)
            sent = time.perf_counter()
            answer = peer.ask({"task": CAPTION, "requests": [{"image": str(path), "prompt": "", "tokens": TOKENS}]})
            seconds.append(time.perf_counter() - sent)
            tokens.append(tuple(answer["tokens"][0]))
        memory = peer.memory_bytes()
    return Captions(tuple(seconds[1:]), memory, tuple(tokens[1:]))
