"""OpenVINO, for the ViT alone: python -m benchmarks.compare.programs.vision CHECKPOINT THREADS WORK TYPE

``fp32`` is the model as it is converted from torch, computed in what OpenVINO takes for the processor's best precision;
``int8`` is quantized by NNCF's recipe for transformers, with a few images. A job's requests have ``pixels``, a file of
(1, 3, S, S) numbers, in place of an image.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from benchmarks.compare.programs.protocol import Job, Output, serve

_SAMPLES = 8
"""Images that decide the ranges in int8."""


def convert(checkpoint: Path, file: Path, kind: str) -> None:
    """Write a checkpoint's ViT as OpenVINO's intermediate representation."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    class Embeds(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            embeds: torch.Tensor = self.model(pixels).last_hidden_state
            return embeds

    whole = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    vision, side = whole.vision_model.eval(), whole.config.vision_config.image_size
    whole.language_model = torch.nn.Identity()  # most of the memory
    example = torch.zeros(1, 3, side, side)
    with torch.inference_mode(False), torch.no_grad():
        model = ov.convert_model(Embeds(vision), example_input=example, input=[1, 3, side, side])
    if kind == "int8":
        import nncf

        rng = np.random.default_rng(0)
        images = [rng.normal(0, 1, (1, 3, side, side)).astype(np.float32) for _ in range(_SAMPLES)]
        data = nncf.Dataset(images)
        model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=_SAMPLES)
    ov.save_model(model, file, compress_to_fp16=False)


class Vision:
    """The converted ViT, for one image at a time, as fast as it can be."""

    def __init__(self, file: Path, threads: int) -> None:
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._model: Any = ov.Core().compile_model(file, "CPU", config)

    def answer(self, job: Job) -> Output:
        """``image_embeds`` (1, N, D) of a job's only request."""
        (request,) = job["requests"]
        embeds: np.ndarray[Any, Any] = self._model(np.load(request["pixels"]))[0]
        return embeds


def main(checkpoint: str, threads: str, work: str, kind: str) -> None:
    """Convert if need be, in a process of its own, and serve."""
    file = Path(work) / f"openvino-{kind}.xml"

    def load() -> Callable[[Job], Output]:
        if not file.exists():
            subprocess.run([sys.executable, "-m", __spec__.name, "--convert", checkpoint, str(file), kind], check=True)
        return Vision(file, int(threads)).answer

    serve(load, ("openvino", "nncf") if kind == "int8" else ("openvino",))


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main(*sys.argv[1:])
