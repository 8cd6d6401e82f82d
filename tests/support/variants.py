"""A random BLIP-2 of odd sizes for each language model, and its bundle of three slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.checkpoints import save_blip2

VARIANTS: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 371,
        "hidden_size": 40,
        "num_attention_heads": 5,
        "enable_bias": False,
        "num_hidden_layers": 4,
    },
    "llama": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    # as Flan-T5 in BLIP-2
    "t5": {"dense_act_fn": "gelu", "bos_token_id": 30, "d_kv": 5, "num_heads": 5},
}
"""What else varies is compared graph by graph, in ``tests/export``: neither loop nor server looks into a model."""
SEEDS = {"opt": 28, "llama": 22, "t5": 59}


def variant_checkpoint(language: str) -> Path:
    return checkpoint_of(save_blip2, language, seed=SEEDS[language], text=VARIANTS[language])


def variant_bundle(language: str) -> Path:
    from blipstream_export.build import BuildOptions

    return bundle_of(variant_checkpoint(language), BuildOptions(max_sequences=3, max_tokens=96))
