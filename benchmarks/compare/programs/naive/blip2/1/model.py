"""A Python model around ``generate`` of transformers: requests one after the other, each answered at its end."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

CHECKPOINT, DTYPE, THREADS = "NAIVE_CHECKPOINT", "NAIVE_DTYPE", "NAIVE_THREADS"
"""Environment variables that say what is served."""


class TritonPythonModel:
    """The model."""

    def initialize(self, _args: dict[str, str]) -> None:
        """Load the checkpoint."""
        torch.set_num_threads(int(os.environ[THREADS]))
        self.dtype = getattr(torch, os.environ[DTYPE])
        self.model = Blip2ForConditionalGeneration.from_pretrained(os.environ[CHECKPOINT], dtype=self.dtype).eval()
        self.processor = Blip2Processor.from_pretrained(os.environ[CHECKPOINT])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer one request after the other."""
        return [self._answer(request) for request in requests]

    @torch.inference_mode()
    def _answer(self, request: Any) -> Any:
        image, prompt, tokens = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0] for name in ("image", "prompt", "tokens")
        )
        text = {"text": prompt.decode()} if prompt else {}
        inputs = self.processor(images=Image.open(io.BytesIO(image)).convert("RGB"), return_tensors="pt", **text)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        length = int(tokens)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=length, min_new_tokens=length)
        ids = output[0, -length:].numpy().astype(np.int32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", ids)])
