"""The peers: in which environment each runs, what its process is, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare import environments
from benchmarks.compare.process import Peer
from benchmarks.compare.tasks import ANSWERS, CAPTION, FEATURES, LANGUAGE, VISION, VQA

_LANGUAGE = tuple(f"{LANGUAGE}-{rows}" for rows in (1, 4, 16))


@dataclass(frozen=True)
class System:
    """A peer.

    Attributes:
        environment: of :data:`benchmarks.compare.environments.REQUIREMENTS`.
        program: module in :mod:`benchmarks.compare.programs`.
        options: of its command line, after checkpoint and threads; ``WORK`` and ``BUNDLE`` stand for the folders.
        tasks: what it is asked; ``name:size`` asks in static batches of so many requests.
    """

    environment: str
    program: str
    options: Sequence[str]
    tasks: Sequence[str]

    def start(self, checkpoint: Path, bundle: Path, work: Path, threads: int, log: Path) -> Peer:
        """Its process, to be entered."""
        interpreter = environments.python(self.environment, work)
        folders = {"WORK": str(work), "BUNDLE": str(bundle)}
        options = [folders.get(option, option) for option in self.options]
        module = f"benchmarks.compare.programs.{self.program}"
        return Peer([interpreter, "-m", module, str(checkpoint), str(threads), *options], log, threads)


BATCHES = (1, 4, 16)
_BATCHED = tuple(f"{task}:{size}" for task in (VQA, ANSWERS) for size in BATCHES)
SYSTEMS = {
    "transformers-fp32": System("transformers", "huggingface", ("fp32", "eager"), (FEATURES, CAPTION, *_BATCHED)),
    "transformers-bf16": System("transformers", "huggingface", ("bf16", "eager"), (FEATURES, CAPTION, *_BATCHED)),
    "transformers-bf16-compiled": System("transformers", "huggingface", ("bf16", "compiled"), (FEATURES, CAPTION)),
    "transformers-fp32-compiled": System("transformers", "huggingface", ("fp32", "compiled"), (FEATURES, CAPTION)),
    "naive-triton-fp32": System(environments.PROJECT, "naive_triton", ("fp32",), (CAPTION, VQA, ANSWERS)),
    "naive-triton-bf16": System(environments.PROJECT, "naive_triton", ("bf16",), (CAPTION, VQA, ANSWERS)),
    "openvino-fp32": System("openvino", "vision", ("WORK", "fp32"), (VISION,)),
    "openvino-int8": System("openvino", "vision", ("WORK", "int8"), (VISION,)),
    "ctranslate2-int8": System("ctranslate2", "language", ("WORK", "int8"), _LANGUAGE),
}
"""In the order in which they run: the first that does a task is what the outputs of all are compared with."""
ENGINE = System(environments.PROJECT, "engine", ("BUNDLE",), _LANGUAGE)
"""Blipstream's own counterpart where no server is asked."""
