"""The planner, on plain integers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from blipstream_kernels.plan import (
    FORMS,
    DType,
    Problem,
    choose,
    config_of,
    estimated_microseconds,
    multiply_adds_per_block,
)
from hypothesis import given
from hypothesis import strategies as st

PUBLISHED = Problem(batch=1, heads=12, queries=32, tokens=257, width=1408, head_dim=64, dtype="fp16")
A100 = 108

problems = st.builds(
    Problem,
    batch=st.integers(1, 64),
    heads=st.integers(1, 16),
    queries=st.integers(1, 200),
    tokens=st.integers(1, 2000),
    width=st.integers(1, 2000),
    head_dim=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
)


@given(problem=problems, multiprocessors=st.integers(1, 200), splits=st.none() | st.integers(1, 50))
def test_every_token_is_in_one_split_and_no_split_is_empty(
    problem: Problem, multiprocessors: int, splits: int | None
) -> None:
    plan = choose(problem, multiprocessors, splits=splits)
    assert plan.tokens_per_split % plan.config.block_tokens == 0
    assert (plan.splits - 1) * plan.tokens_per_split < problem.tokens <= plan.splits * plan.tokens_per_split
    assert splits is None or plan.splits <= splits


@given(problem=problems, multiprocessors=st.integers(1, 200))
def test_no_other_plan_is_estimated_faster(problem: Problem, multiprocessors: int) -> None:
    best = estimated_microseconds(problem, choose(problem, multiprocessors), multiprocessors)
    for form, splits in itertools.product(FORMS, range(1, 6)):
        other = choose(problem, multiprocessors, form, splits)
        assert best <= estimated_microseconds(problem, other, multiprocessors)


@pytest.mark.parametrize("form", FORMS)
def test_few_images_are_split_and_as_many_as_fill_the_gpu_are_not(form: str) -> None:
    def splits_of(batch: int) -> int:
        return choose(replace(PUBLISHED, batch=batch), A100, form).splits  # type: ignore[arg-type]

    assert splits_of(1) > 1
    assert splits_of(A100 // PUBLISHED.heads) == 1
    assert splits_of(2 * A100 // PUBLISHED.heads) == 1


def test_one_image_keeps_most_multiprocessors_busy_in_one_round() -> None:
    plan = choose(replace(PUBLISHED, tokens=677), A100)
    assert A100 / 2 <= PUBLISHED.heads * plan.splits <= A100


@pytest.mark.parametrize(("tokens", "form"), [(64, "projected"), (257, "absorbed"), (677, "absorbed")])
def test_few_tokens_are_projected_and_more_absorbed(tokens: int, form: str) -> None:
    assert choose(replace(PUBLISHED, batch=9, tokens=tokens), A100).form == form


def test_multiply_adds_are_those_of_the_formulas() -> None:
    assert multiply_adds_per_block(PUBLISHED, "projected", 128) == 2 * 128 * 1408 * 64 + 2 * 32 * 128 * 64
    assert multiply_adds_per_block(PUBLISHED, "absorbed", 128) == 2 * 32 * 1408 * (128 + 64)


@pytest.mark.parametrize(("block", "cheaper"), [(32, "projected"), (128, "absorbed")])
def test_absorbing_needs_blocks_longer_than_a_head(block: int, cheaper: str) -> None:
    costs = {form: multiply_adds_per_block(PUBLISHED, form, block) for form in FORMS}
    assert min(costs, key=costs.__getitem__) == cheaper


@pytest.mark.parametrize(("queries", "block"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 32), (200, 32)])
def test_queries_of_a_program(queries: int, block: int) -> None:
    assert replace(PUBLISHED, queries=queries).block_queries == block


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_block_sizes_are_powers_of_two(dtype: DType) -> None:
    for form in FORMS:
        config = config_of(form, dtype)
        assert all(size & (size - 1) == 0 for size in (config.block_tokens, config.block_width, config.num_warps))
