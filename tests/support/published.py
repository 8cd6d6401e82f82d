"""The published models' true layer shapes, at a depth of one layer each (the Q-Former's two), with random weights.

Shapes are those of the configurations of Salesforce/blip2-* and Salesforce/instructblip-* on the Hugging Face hub.
Tokenizers are the small ones of :mod:`tests.support.languages`; the language models' vocabularies have their true size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.checkpoints import TinySizes, save_blip2
from tests.support.instructblip import save_instructblip, save_instructblipvideo


@dataclass(frozen=True)
class Published:
    """A language model's kind and shapes, and what reads the image."""

    language: str
    text: dict[str, Any]
    instructed: bool = False
    image_size: int = 224
    video: bool = False

    def save(self, folder: Path) -> Path:
        """Write a random checkpoint into ``folder``, and return it."""
        sizes = TinySizes(
            image_size=self.image_size,
            patch_size=14,
            vision_hidden=1408,
            vision_layers=1,
            vision_heads=16,
            vision_intermediate=6144,
            qformer_hidden=768,
            qformer_layers=2,
            qformer_heads=12,
            qformer_intermediate=3072,
            num_query_tokens=32,
        )
        instructed = save_instructblipvideo if self.video else save_instructblip
        save = instructed if self.instructed else save_blip2
        return save(folder, self.language, seed=1, sizes=sizes, text=self.text)


def _opt(width: int, ffn: int) -> dict[str, Any]:
    return {
        "vocab_size": 50304,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": ffn,
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
    }


def _llama(width: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 32001,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": 2048,
    }


def _t5(width: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 64,
        "d_ff": ffn,
        "num_heads": heads,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "dense_act_fn": "gelu_new",
    }


PUBLISHED = {
    "blip2-opt-2.7b": Published("opt", _opt(2560, 10240)),
    "blip2-opt-2.7b-coco": Published("opt", _opt(2560, 10240), image_size=364),
    "blip2-opt-6.7b": Published("opt", _opt(4096, 16384)),
    "blip2-flan-t5-xl": Published("t5", _t5(2048, 32, 5120)),
    "blip2-flan-t5-xxl": Published("t5", _t5(4096, 64, 10240)),
    "instructblip-flan-t5-xl": Published("t5", _t5(2048, 32, 5120), instructed=True),
    "instructblip-flan-t5-xxl": Published("t5", _t5(4096, 64, 10240), instructed=True),
    "instructblip-vicuna-7b": Published("llama", _llama(4096, 32, 11008), instructed=True),
    "instructblip-vicuna-13b": Published("llama", _llama(5120, 40, 13824), instructed=True),
    "instructblipvideo-vicuna-7b": Published("llama", _llama(4096, 32, 11008), instructed=True, video=True),
}
