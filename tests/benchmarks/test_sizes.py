"""The arithmetic of sizes, against operations that torch counts and weights that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, Blip2ForConditionalGeneration

from benchmarks.fullsize.checkpoint import full_config
from benchmarks.sizes import DECODER, QFORMER, VISION, ModelSizes, StageWeights, model_sizes

DEMO = Path(__file__).resolve().parents[2] / "demo"


def full_size(kind: str) -> ModelSizes:
    with torch.device("meta"):
        return model_sizes(Blip2ForConditionalGeneration(full_config(kind)))


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-t5"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    config = Blip2Config.from_pretrained(DEMO / name)
    config._attn_implementation = "eager"
    model = Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    sizes = model_sizes(model)
    side = config.vision_config.image_size
    with torch.no_grad():
        with FlopCounterMode(display=False) as seen:
            embeds = model.vision_model(torch.zeros(1, 3, side, side)).last_hidden_state
        assert embeds.shape == (1, sizes.image_tokens, sizes.vision_width)
        assert seen.get_total_flops() == sizes.vision_flops
        with FlopCounterMode(display=False) as read:
            output = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=embeds)
            model.language_projection(output.last_hidden_state)
        assert read.get_total_flops() == sizes.qformer_flops


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-t5"])
def test_no_weight_is_counted_twice_or_left_out(name: str) -> None:
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(DEMO / name))
    total = sum(stage.values for stage in model_sizes(model).stages.values())
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_a_step_of_opt_reads_all_but_the_table_of_positions() -> None:
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(DEMO / "checkpoint"))
    language = model.language_model
    positions = language.model.decoder.embed_positions.weight.numel()
    assert model_sizes(model).step_weights == sum(p.numel() for p in language.parameters()) - positions


def test_a_step_of_t5_reads_the_decoder_and_the_head() -> None:
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(DEMO / "checkpoint-t5"))
    sizes = model_sizes(model)
    decoder = sum(p.numel() for name, p in model.language_model.decoder.named_parameters() if "embed" not in name)
    relative = model.language_model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.numel()
    assert sizes.step_weights == decoder - relative + model.language_model.lm_head.weight.numel()
    assert sizes.cross_values == sizes.cache_values > 0


def test_full_size_opt() -> None:
    sizes = full_size("opt-2.7b")
    assert sizes.stages[VISION].values == pytest.approx(986e6, rel=0.01)
    assert sizes.stages[QFORMER].values == pytest.approx(107e6, rel=0.03)
    assert sizes.stages[DECODER].values == pytest.approx(2.65e9, rel=0.01)
    assert sizes.cache_values == 2 * 32 * 32 * 80
    assert sizes.vision_flops == pytest.approx(2 * 986e6 * 257, rel=0.05)


def test_bytes_of_a_step() -> None:
    sizes = ModelSizes({}, 1000, 6, 4, 0, 0, 0, 0, 0, 0)
    assert sizes.step_bytes(rows=3, length=10, itemsize=2) == 2 * (1000 + 3 * 10 * 6)
    assert sizes.step_bytes(rows=3, length=10, itemsize=2, prompt=5) == 2 * (1000 + 3 * (10 * 6 + 5 * 4))


def test_stored_bytes_by_precision() -> None:
    weights = StageWeights(1000, 10)
    stored = {precision: weights.stored(precision) for precision in ("fp32", "fp16", "bf16", "int8", "fp8")}
    assert stored == {"fp32": 4040, "fp16": 2020, "bf16": 2020, "int8": 1020, "fp8": 1020}
    assert [StageWeights(0, 0, 5).stored(precision) for precision in ("fp32", "fp16", "int8")] == [20, 20, 5]


def test_sizes_survive_json() -> None:
    sizes = full_size("flan-t5-xl")
    assert ModelSizes.from_json(sizes.to_json()) == sizes
