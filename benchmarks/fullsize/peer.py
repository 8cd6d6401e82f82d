"""Captions by transformers: python -m benchmarks.fullsize.peer FOLDER DTYPE COUNT THREADS; prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from benchmarks.fullsize.measure import TOKENS, images

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def caption(folder: Path, dtype: str, count: int) -> dict[str, Any]:
    """Caption ``count`` images after one that is not counted."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    processor = Blip2Processor.from_pretrained(folder)
    seconds, tokens = [], []
    for image in images(count + 1):
        sent = time.perf_counter()
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(DTYPES[dtype])
        output = model.generate(pixel_values=pixels, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        seconds.append(time.perf_counter() - sent)
        tokens.append(output[0, -TOKENS:].tolist())
    return {"seconds": seconds[1:], "memory": psutil.Process().memory_info().rss, "token_ids": tokens[1:]}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    with torch.inference_mode():
        print(json.dumps(caption(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
