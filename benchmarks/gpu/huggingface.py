"""Captions by transformers, ``eager`` or ``compiled``: pixels in, token ids out.

*eager* is ``generate`` as it comes: a cache that grows, kernels launched one by one. *compiled* is ``generate`` with
``cache_implementation="static"``, which lets transformers compile the language model's decode step by ``torch.compile``
(mode ``reduce-overhead``: with CUDA graphs); the first caption of each batch size compiles and is not counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Blip2ForConditionalGeneration, CompileConfig

from benchmarks.gpu.job import Job, parse
from benchmarks.gpu.limits import TORCH_DTYPES, synchronizer
from benchmarks.gpu.rows import CAPTION
from benchmarks.gpu.timing import measure

BATCHES = (1, 8)
TOKENS = 20
"""Of a caption, neither more nor less."""
EAGER, COMPILED = "transformers-eager", "transformers-compiled"


def pixels(count: int, side: int) -> npt.NDArray[np.float32]:
    """Different images (count, 3, side, side), the same in every process."""
    return np.random.default_rng(0).standard_normal((count, 3, side, side), dtype=np.float32)


class Captioner:
    """The checkpoint in transformers.

    Args:
        job: device, dtype and checkpoint.
        compiled: see above.
        backend: of ``torch.compile``.
    """

    def __init__(self, job: Job, *, compiled: bool, backend: str = "inductor") -> None:
        self._dtype, self._device = TORCH_DTYPES[job.dtype], job.device
        model = Blip2ForConditionalGeneration.from_pretrained(job.checkpoint, dtype=self._dtype)
        self._model = model.eval().to(job.device)
        self._options: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        if compiled:
            config = CompileConfig(backend=backend)
            config._compile_all_devices = True
            self._options |= {"cache_implementation": "static", "compile_config": config}

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return int(self._model.config.vision_config.image_size)

    def caption(self, images: npt.NDArray[np.float32]) -> list[list[int]]:
        """Token ids of a caption of each image."""
        inputs = torch.from_numpy(images).to(self._device, self._dtype)
        output = self._model.generate(pixel_values=inputs, **self._options)
        found: list[list[int]] = output[:, -TOKENS:].tolist()
        return found


def main(job: Job, kind: str, backend: str) -> None:
    """Time captions at each batch, and keep the tokens of the largest."""
    system = COMPILED if kind == "compiled" else EAGER
    captioner = Captioner(job, compiled=kind == "compiled", backend=backend)
    wait = synchronizer(job.device)
    for batch in BATCHES:
        images = pixels(batch, captioner.image_size)

        def run(images: npt.NDArray[np.float32] = images) -> list[list[int]]:
            tokens = captioner.caption(images)
            wait()
            return tokens

        job.keep([measure(system, CAPTION, batch, run, seconds=job.seconds)])
        job.note(tokens=run())


if __name__ == "__main__":
    the_job, (the_kind, the_backend) = parse(None, "kind", "backend")
    with torch.inference_mode():
        main(the_job, the_kind, the_backend)
