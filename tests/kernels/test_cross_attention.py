"""Both forms, whole and in splits, against plain torch in fp64."""

from __future__ import annotations

import pytest
import torch
from blipstream_kernels import reference
from blipstream_kernels.launch import cross_attention
from blipstream_kernels.plan import FORMS, Form
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.problems import Inputs, assert_as_exact_as_torch, draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
both_forms = pytest.mark.parametrize("form", FORMS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
whole_and_split = pytest.mark.parametrize("splits", [1, 3])


def run(inputs: Inputs, form: Form | None, **options: object) -> torch.Tensor:
    return cross_attention(*inputs.arguments, form, **options)  # type: ignore[arg-type]


@both_forms
@all_dtypes
@pytest.mark.parametrize(("splits", "masked"), [(1, False), (3, True)])
def test_equals_torch(device: torch.device, form: Form, dtype: torch.dtype, splits: int, masked: bool) -> None:
    inputs = draw(queries=7, tokens=291, width=72, dtype=dtype, device=device, masked=masked)
    assert_as_exact_as_torch(run(inputs, form, splits=splits), inputs)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "heads": st.integers(1, 3),
            "queries": st.integers(1, 37),
            "tokens": st.integers(1, 200),
            "width": st.integers(1, 75),
            "head_dim": st.sampled_from([16, 32]),
            "masked": st.booleans(),
        }
    ),
    splits=st.sampled_from([None, 1, 2, 5]),
)
def test_equals_torch_whatever_the_sizes(
    device: torch.device, form: Form, dtype: torch.dtype, sizes: dict[str, int], splits: int | None
) -> None:
    inputs = draw(dtype=dtype, device=device, **sizes)  # type: ignore[arg-type]
    assert_as_exact_as_torch(run(inputs, form, splits=splits), inputs)


@both_forms
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_heads_of_every_size(device: torch.device, form: Form, head_dim: int) -> None:
    inputs = draw(batch=1, heads=1, head_dim=head_dim, width=33, dtype=torch.float16, device=device)
    assert_as_exact_as_torch(run(inputs, form, splits=1), inputs)


@both_forms
def test_the_published_width(device: torch.device, form: Form) -> None:
    inputs = draw(batch=1, heads=2, queries=32, tokens=257, width=1408, head_dim=64, dtype=torch.float16, device=device)
    assert_as_exact_as_torch(run(inputs, form), inputs)


@both_forms
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_the_options_of_fp32_are_as_exact(device: torch.device, form: Form, precision: str) -> None:
    inputs = draw(tokens=130, device=device)
    assert_as_exact_as_torch(run(inputs, form, splits=2, precision=precision), inputs)


@both_forms
@all_dtypes
@whole_and_split
def test_scores_of_thousands(device: torch.device, form: Form, dtype: torch.dtype, splits: int) -> None:
    inputs = draw(tokens=150, dtype=dtype, device=device, sharpness=3000.0, masked=True)
    assert_as_exact_as_torch(run(inputs, form, splits=splits), inputs)


@both_forms
def test_large_features_stay_within_fp16(device: torch.device, form: Form) -> None:
    inputs = draw(tokens=130, dtype=torch.float16, device=device)
    inputs = inputs.with_(image=inputs.image + 2000, query=inputs.query / 64, value_weight=inputs.value_weight / 64)
    assert_as_exact_as_torch(run(inputs, form, splits=1), inputs)


@both_forms
def test_a_key_bias_changes_nothing_and_a_value_bias_is_added(device: torch.device, form: Form) -> None:
    inputs = draw(device=device)
    unbiased = inputs.with_(key_bias=torch.zeros_like(inputs.key_bias), value_bias=torch.zeros_like(inputs.value_bias))
    assert float(inputs.key_bias.abs().max()) > 1
    assert torch.equal(run(inputs, form), run(inputs.with_(key_bias=unbiased.key_bias), form))
    torch.testing.assert_close(run(inputs, form), run(unbiased, form) + inputs.value_bias, rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs.truth(), unbiased.truth() + inputs.value_bias, rtol=0, atol=1e-12)


@both_forms
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_masks_of_every_type(device: torch.device, form: Form, mask_dtype: torch.dtype) -> None:
    inputs = draw(device=device, masked=True)
    assert inputs.key_mask is not None
    found = run(inputs.with_(key_mask=inputs.key_mask.to(mask_dtype)), form)
    assert torch.equal(found, run(inputs, form))


@both_forms
@whole_and_split
def test_a_row_without_a_key_gets_the_mean_of_all_values(device: torch.device, form: Form, splits: int) -> None:
    inputs = draw(tokens=291, device=device, masked=True)
    assert inputs.key_mask is not None
    inputs.key_mask[1] = False
    found = run(inputs, form, splits=splits)
    mean = (inputs.image[1].double() @ inputs.value_weight.T.double()).mean(0) + inputs.value_bias
    torch.testing.assert_close(found[1].double(), mean.expand_as(found[1]), rtol=0, atol=2e-6)
    assert_as_exact_as_torch(found, inputs)


@both_forms
@whole_and_split
@pytest.mark.parametrize("kept", [0, 290])
def test_one_key_left_in_some_block(device: torch.device, form: Form, splits: int, kept: int) -> None:
    inputs = draw(tokens=291, device=device, masked=True)
    assert inputs.key_mask is not None
    inputs.key_mask[0] = torch.arange(291, device=device) == kept
    found = run(inputs, form, splits=splits)
    value = inputs.image[0, kept].double() @ inputs.value_weight.T.double() + inputs.value_bias
    torch.testing.assert_close(found[0].double(), value.expand_as(found[0]), rtol=0, atol=5e-6)


@both_forms
def test_strides_are_free_but_for_the_last(device: torch.device, form: Form) -> None:
    inputs = draw(tokens=70, device=device, masked=True)
    assert inputs.key_mask is not None
    strided = inputs.with_(
        query=torch.cat([inputs.query, inputs.query.neg()], dim=-1)[..., : inputs.query.shape[-1]],
        image=inputs.image.transpose(0, 1).contiguous().transpose(0, 1),
        key_weight=torch.nn.functional.pad(inputs.key_weight, (0, 3))[:, : inputs.image.shape[-1]],
        value_weight=inputs.value_weight.repeat_interleave(2, 0)[::2],
        key_mask=torch.nn.functional.pad(inputs.key_mask, (1, 2))[:, 1:-2],
    )
    assert not any(x.is_contiguous() for x in (strided.query, strided.image, strided.key_weight, strided.key_mask))
    assert torch.equal(run(strided, form, splits=2), run(inputs, form, splits=2))


@both_forms
def test_images_may_share_their_memory(device: torch.device, form: Form) -> None:
    inputs = draw(batch=3, device=device)
    shared = inputs.with_(image=inputs.image[:1].expand(3, -1, -1))
    assert_as_exact_as_torch(run(shared, form), shared)


def test_the_scale_is_that_of_the_head_unless_given(device: torch.device) -> None:
    inputs = draw(device=device)
    assert torch.equal(run(inputs, None), run(inputs.with_(scale=16**-0.5), None))
    other = inputs.with_(scale=0.7)
    assert_as_exact_as_torch(run(other, None), other)


def test_the_reference_is_what_torch_calls_attention() -> None:
    inputs = draw(masked=True).with_(scale=0.3)
    assert inputs.key_mask is not None
    key, value = (
        torch.nn.functional.linear(inputs.image, weight, bias)
        for weight, bias in ((inputs.key_weight, inputs.key_bias), (inputs.value_weight, inputs.value_bias))
    )
    q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (inputs.query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=inputs.key_mask[:, None, None], scale=0.3
    )
    found = reference.cross_attention(*inputs.arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), rtol=0, atol=2e-6)
