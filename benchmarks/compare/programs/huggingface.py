"""transformers: python -m benchmarks.compare.programs.huggingface CHECKPOINT THREADS DTYPE FORM

``eager`` is ``generate`` as it comes; ``compiled`` has the ViT and the Q-Former compiled by ``torch.compile``, a static
cache, and with it the language model's step compiled by ``generate``. All requests of a job are one static batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor, CompileConfig

from benchmarks.compare.programs.protocol import Job, Output, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HuggingFace:
    """A checkpoint in transformers.

    Args:
        checkpoint: its folder.
        dtype: of :data:`DTYPES`.
        compiled: see above.
    """

    def __init__(self, checkpoint: Path, dtype: str, *, compiled: bool) -> None:
        self._dtype = DTYPES[dtype]
        self._model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=self._dtype).eval()
        self._processor = Blip2Processor.from_pretrained(checkpoint)
        self._processor.tokenizer.padding_side = "left"
        self._options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if compiled:
            config = CompileConfig(backend="inductor", mode="default")
            config._compile_all_devices = True
            self._options |= {"cache_implementation": "static", "compile_config": config}
            self._model.vision_model.compile()
            self._model.qformer.compile()

    @torch.inference_mode()
    def answer(self, job: Job) -> Output:
        """Features, captions or answers, by the job's task."""
        requests = job["requests"]
        images = [Image.open(request["image"]).convert("RGB") for request in requests]
        if job["task"] == "features":
            return self._features(self._processor(images=images, return_tensors="pt")["pixel_values"])
        return self._generate(images, requests)

    def _features(self, pixels: torch.Tensor) -> Output:
        """Soft tokens (B, Q, D_text)."""
        model = self._model
        seen = model.vision_model(pixels.to(self._dtype)).last_hidden_state
        queries = model.query_tokens.expand(len(seen), -1, -1)
        read = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        soft_tokens: np.ndarray[Any, Any] = model.language_projection(read).float().numpy()
        return soft_tokens

    def _generate(self, images: list[Image.Image], requests: list[dict[str, Any]]) -> Output:
        texts = [request["prompt"] for request in requests]
        prompts = {"text": texts, "padding": True} if any(texts) else {}
        inputs = self._processor(images=images, return_tensors="pt", **prompts)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        longest = max(request["tokens"] for request in requests)
        output = self._model.generate(**inputs, **self._options, max_new_tokens=longest, min_new_tokens=longest)
        rows = output[:, -longest:].tolist()
        return [row[: request["tokens"]] for row, request in zip(rows, requests, strict=True)]


def main(checkpoint: str, threads: str, dtype: str, form: str) -> None:
    """Serve one form of the checkpoint."""
    torch.set_num_threads(int(threads))
    serve(lambda: HuggingFace(Path(checkpoint), dtype, compiled=form == "compiled").answer, ("transformers", "torch"))


if __name__ == "__main__":
    main(*sys.argv[1:])
