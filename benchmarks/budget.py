"""The memory that serving takes on a device whose CPU and GPU share one memory, by model and precision.

    python -m benchmarks.budget [--max-sequences 4] [--max-tokens 256] [--max-batch 1]

It prints the table of docs/jetson.md. Weights and caches are computed from the models' shapes; activations are an upper
estimate; what processes take is partly measured, partly assumed (:data:`FIXED`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
)

from benchmarks.fullsize import checkpoint as checkpoints
from benchmarks.sizes import ModelSizes, model_sizes
from blipstream.config import ServerConfig

GIB = 1 << 30
MIB = 1 << 20

PRECISIONS = ("fp16", "int8")
"""Of those that serve: bf16 takes what fp16 does, and Orin has no fp8 (compute capability 8.7; it begins with 8.9)."""
HALF = 2
"""Bytes of a cached value and of an activation."""


@dataclass(frozen=True)
class Device:
    """A module: its memory in GiB by name, and its bandwidth in GB/s by its data sheet."""

    name: str
    memory: int
    bandwidth: float

    @property
    def usable(self) -> float:
        """Bytes for programs."""
        return USABLE * self.memory * GIB


USABLE = 0.88
"""Of a module's memory. An Orin NX of 16 GB shows 14.1 GiB to CUDA; the rest is set aside for firmware and system."""
DEVICES = (
    Device("Orin NX 16 GB", 16, 102.4),
    Device("AGX Orin 32 GB", 32, 204.8),
    Device("AGX Orin 64 GB", 64, 204.8),
)

FIXED = {
    "system without a desktop (assumed)": 1536 * MIB,
    "Triton and its Python processes (measured on x86-64, without a GPU: 300 MiB)": 300 * MIB,
    "CUDA and TensorRT in three processes (assumed, 512 MiB each)": 3 * 512 * MIB,
    "cache of image features (its default)": ServerConfig().cache_bytes,
}
"""What the models' sizes do not change."""


@dataclass(frozen=True)
class Load:
    """For what a server is built."""

    max_sequences: int = 4
    max_tokens: int = 256
    max_batch: int = 1


@dataclass(frozen=True)
class Budget:
    """Bytes of one model in one precision."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """With all that is fixed."""
        return self.weights + self.cache + self.activations + sum(FIXED.values())


def budget(model: nn.Module, precision: str, load: Load) -> Budget:
    """What it takes to serve a model of transformers, whose weights may be on the meta device."""
    sizes = model_sizes(model)
    return Budget(
        weights=sum(stage.stored(precision) for stage in sizes.stages.values()),
        cache=HALF * load.max_sequences * load.max_tokens * (sizes.cache_values + sizes.cross_values),
        activations=_activations(model.config, sizes, load),
    )


def _activations(config: Any, sizes: ModelSizes, load: Load) -> int:
    """Of the ViT, the language model's prefill and the logits, each with memory of its own.

    A prefill of all rows at their full length is the largest shape that the engine is built for. A block holds its
    input, its residual, queries, keys and values, the widest feed-forward activation, and, where attention is not
    fused, the scores of every head.
    """
    vision, text = config.vision_config, config.text_config
    seen = load.max_batch * sizes.image_tokens
    scores = load.max_batch * vision.num_attention_heads * sizes.image_tokens**2
    vit = seen * (5 * vision.hidden_size + vision.intermediate_size) + scores
    inner = getattr(text, "ffn_dim", None) or getattr(text, "d_ff", None) or text.intermediate_size
    rows = load.max_sequences * load.max_tokens
    prefill = rows * (5 * text.hidden_size + inner) + rows * text.num_attention_heads * load.max_tokens
    logits = 2 * load.max_sequences * sizes.vocab_size  # fp32, on the device and for the host
    return HALF * (vit + prefill) + 4 * logits


def _full_size(kind: str) -> nn.Module:
    return Blip2ForConditionalGeneration(checkpoints.full_config(kind))


def _vicuna() -> nn.Module:
    """InstructBLIP with Vicuna-7B, by the configuration of Salesforce/instructblip-vicuna-7b."""
    text = LlamaConfig(vocab_size=32001, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    return InstructBlipForConditionalGeneration(InstructBlipConfig(text_config=text.to_dict(), num_query_tokens=32))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BLIP-2 OPT-2.7B": lambda: _full_size("opt-2.7b"),
    "BLIP-2 Flan-T5-XL": lambda: _full_size("flan-t5-xl"),
    "BLIP-2 OPT-6.7B": lambda: _full_size("opt-6.7b"),
    "InstructBLIP Vicuna-7B": _vicuna,
}


def table(load: Load) -> str:
    """Every model in every precision, as Markdown; sizes in GiB."""
    names = [f"fits {device.name} ({device.usable / GIB:.1f})" for device in DEVICES]
    columns = ["model", "", "weights", "KV cache", "activations", "everything", *names]
    lines = [columns, ["---"] * len(columns)]
    for name, make in MODELS.items():
        with torch.device("meta"):
            model = make()
        for precision in PRECISIONS:
            found = budget(model, precision, load)
            parts = (found.weights, found.cache, found.activations, found.total)
            fits = ["yes" if found.total <= device.usable else "no" for device in DEVICES]
            lines.append([name, precision, *(f"{part / GIB:.2f}" for part in parts), *fits])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and what is in it besides the models."""
    parser = argparse.ArgumentParser(prog="benchmarks.budget", description="Memory of serving, by model and precision.")
    parser.add_argument("--max-sequences", type=int, default=Load.max_sequences)
    parser.add_argument("--max-tokens", type=int, default=Load.max_tokens)
    parser.add_argument("--max-batch", type=int, default=Load.max_batch)
    print(table(Load(**vars(parser.parse_args(arguments)))))
    print()
    print("\n".join(f"- {name}: {size / GIB:.2f} GiB" for name, size in FIXED.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
