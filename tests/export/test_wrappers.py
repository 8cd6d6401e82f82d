"""Every wrapper, run eagerly, computes what transformers computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from blipstream_export.models.opt import OPTDecoder
from blipstream_export.models.qformer import InstructionQFormer, QFormer
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.ops import attention, cached_attention
from torch import Tensor

from tests.support.checkpoints import TinySizes, make_blip2_opt
from tests.support.instructblip import make_instructblip


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 7), (3, 12), (4, 8)])
def test_attention_equals_torch(heads: int, head_dim: int) -> None:
    query, key, value = torch.randn(2, 5, heads * head_dim), *torch.randn(2, 2, 9, heads * head_dim)
    split = [x.unflatten(-1, (heads, head_dim)).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*split, scale=0.3).transpose(1, 2).flatten(2)
    assert_close(attention(query, key, value, heads, 0.3), expected)


def test_padding_of_keys_is_not_attended_to() -> None:
    query, key, value = torch.randn(3, 5, 12), *torch.randn(2, 3, 9, 12)
    lengths = (9, 1, 6)
    mask = torch.tensor([[1] * length + [0] * (9 - length) for length in lengths], dtype=torch.int32)
    expected = [
        attention(query[row : row + 1], key[row : row + 1, :length], value[row : row + 1, :length], 4, 0.4)
        for row, length in enumerate(lengths)
    ]
    assert_close(attention(query, key, value, 4, 0.4, mask), torch.cat(expected))


def test_attention_with_a_cache_equals_causal_attention_row_by_row() -> None:
    """Rows of 4, 1 and 6 tokens are prefilled together, then all grow by two steps; two query heads share a key."""
    heads, kv_heads, dim, capacity = 4, 2, 5, 11
    lengths = torch.tensor([4, 1, 6])
    tokens = torch.randn(3, 8, (heads + 2 * kv_heads) * dim)  # what each row holds at the end
    key, value = torch.randn(2, 3, kv_heads, capacity, dim)

    def run(qkv: Tensor, ends: Tensor) -> Tensor:
        nonlocal key, value
        output, key, value = cached_attention(
            qkv, key, value, (ends - 1).int(), ends.max().int(), heads, kv_heads, dim**-0.5
        )
        return output

    prefill = run(tokens[:, :6], lengths)
    first = run(torch.stack([tokens[row, lengths[row]] for row in range(3)])[:, None], lengths + 1)
    second = run(torch.stack([tokens[row, lengths[row] + 1] for row in range(3)])[:, None], lengths + 2)
    for row, length in enumerate(lengths.tolist()):
        q, k, v = tokens[row, : length + 2].split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, dim)).transpose(0, 1) for x in (q, k, v))
        whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        expected = whole.transpose(0, 1).flatten(1)  # (length + 2, H * D)
        found = torch.cat([prefill[row, :length], first[row], second[row]])
        assert_close(found, expected)


def test_operators_are_well_formed_for_export() -> None:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention, (*torch.randn(3, 2, 4, 6), 2, 0.5), test_utils=utils)
    cache = torch.randn(2, 2, 1, 7, 3)
    lengths = (torch.tensor([3, 1], dtype=torch.int32), torch.tensor(4, dtype=torch.int32))
    torch.library.opcheck(cached_attention, (torch.randn(2, 4, 12), *cache, *lengths, 2, 1, 0.5), test_utils=utils)


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(("hidden", "heads", "image_size", "patch"), [(36, 3, 28, 7), (10, 1, 15, 5), (24, 2, 33, 8)])
def test_vision_encoder(qkv_bias: bool, hidden: int, heads: int, image_size: int, patch: int) -> None:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config = Blip2VisionConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=3 * hidden + 1,
        num_hidden_layers=3,
        image_size=image_size,
        patch_size=patch,
        qkv_bias=qkv_bias,
        initializer_range=0.3,
    )
    model = Blip2VisionModel(config).eval()
    pixel_values = torch.randn(3, 3, image_size, image_size)
    assert_close(VisionEncoder(model)(pixel_values), model(pixel_values).last_hidden_state)


QFORMER_SIZES = (
    TinySizes(),
    TinySizes(qformer_hidden=21, qformer_heads=3, qformer_layers=1, num_query_tokens=1),
    TinySizes(cross_attention_frequency=1, qformer_layers=2, num_query_tokens=9),
    TinySizes(cross_attention_frequency=3, qformer_layers=5),
)


@pytest.mark.parametrize("sizes", QFORMER_SIZES, ids=str)
def test_qformer(sizes: TinySizes) -> None:
    model = make_blip2_opt(sizes=sizes)
    pixel_values = torch.randn(2, 3, sizes.image_size, sizes.image_size)
    features = model.get_image_features(pixel_values, return_dict=True)
    assert_close(QFormer(model)(features.last_hidden_state), features.pooler_output)


@pytest.mark.parametrize("sizes", QFORMER_SIZES, ids=str)
def test_instruction_qformer(sizes: TinySizes) -> None:
    """Instructions of unequal lengths in one padded batch, each against itself alone in transformers.

    In fp64: in fp32 the rounding of a batch and of a row alone exceed the tolerance on some processors.
    """
    model = make_instructblip(sizes=sizes, qformer={"hidden_act": "gelu_new"}).double()
    qformer = InstructionQFormer(model).double()
    instructions = [torch.randint(5, 150, (length,)) for length in (7, 1, 40)]
    ids, mask = pad(instructions, pad_id=0)
    pixel_values = torch.randn(3, 3, sizes.image_size, sizes.image_size).double()
    image_embeds = VisionEncoder(model.vision_model)(pixel_values)
    alone = [model.get_image_features(pixel_values[row : row + 1], ids[None]) for row, ids in enumerate(instructions)]
    found = qformer(image_embeds, ids, mask)
    assert_close(found, torch.cat([features.pooler_output for features in alone]))
    assert_close(image_embeds, torch.cat([features.last_hidden_state for features in alone]))
    other = qformer(image_embeds, ids.roll(1, 0), mask.roll(1, 0))
    assert float((found - other).abs().max()) > 0.1, "the soft tokens hardly depend on the instruction"


def test_padding_of_an_instruction_does_not_matter() -> None:
    model = make_instructblip()
    qformer, image_embeds = InstructionQFormer(model), torch.randn(1, 17, 36)
    ids = torch.tensor([[2, 17, 40, 3]])
    found = qformer(image_embeds, ids, torch.ones_like(ids))
    padded = torch.tensor([[2, 17, 40, 3, 9, 0, 33]])
    assert_close(qformer(image_embeds, padded, torch.tensor([[1, 1, 1, 1, 0, 0, 0]])), found)


def pad(rows: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, S) and their mask (B, S), padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def test_soft_tokens_fill_narrow_embeddings_as_transformers_scatters_them() -> None:
    model = make_blip2_opt(sizes=replace(TinySizes(), num_query_tokens=4), opt={"word_embed_proj_dim": 20})
    pixel_values = torch.randn(1, 3, 28, 28)
    seen: list[Tensor] = []
    model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    features = model(pixel_values=pixel_values, input_ids=torch.tensor([[319] * 4 + [2]]))
    soft_tokens = QFormer(model)(features.vision_outputs.last_hidden_state)
    assert_close(soft_tokens, seen[0][:, :4])


# --- decoder ---------------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_one_tensor() -> None:
    decoder = OPTDecoder(make_blip2_opt().language_model)
    assert decoder.lm_head is None
    assert "lm_head.weight" not in decoder.state_dict()
    untied = OPTDecoder(make_blip2_opt(opt={"tie_word_embeddings": False}).language_model)
    assert untied.lm_head is not None
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)
