"""Which form runs, in how many splits, with which block sizes: a pure function of sizes, without torch or a GPU.

The rule is arithmetic: the time of a plan is the multiply-adds of its busiest multiprocessor, and a merge costs what
one more launch costs. Its two constants are estimates that no GPU has confirmed; ``benchmarks/kernels.py`` measures
what would replace them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Form = Literal["projected", "absorbed"]
DType = Literal["fp32", "fp16", "bf16"]

FORMS: tuple[Form, ...] = get_args(Form)
HEAD_DIMS = (16, 32, 64, 128)
"""D of the kernels: powers of two, the smallest that a tensor core multiplies up to what registers hold."""

_LARGEST_BLOCK_Q = 32
_SMALLEST_BLOCK_Q = 16  # rows of a tensor core's tile
_MULTIPLY_ADDS_PER_MICROSECOND = {"fp16": 0.6e6, "bf16": 0.6e6, "fp32": 0.04e6}
"""Of one multiprocessor: about two fifths of what an A100's can do."""
_MERGE_MICROSECONDS = 3.0
"""A second launch, and partial results written and read again."""


@dataclass(frozen=True)
class Problem:
    """Sizes of one cross-attention: query (B, Q, H * D), image (B, N, C)."""

    batch: int
    heads: int
    queries: int
    tokens: int
    width: int
    head_dim: int
    dtype: DType

    @property
    def block_queries(self) -> int:
        """Queries of one program: a power of two, and for the published models all 32 of them."""
        power = 1 << (self.queries - 1).bit_length()
        return min(max(power, _SMALLEST_BLOCK_Q), _LARGEST_BLOCK_Q)

    @property
    def programs_per_split(self) -> int:
        """Programs that read the same range of tokens, over all images."""
        return self.batch * self.heads * _ceil_div(self.queries, self.block_queries)


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled."""

    block_tokens: int
    """n, tokens of a block."""
    block_width: int
    """Columns of a chunk of C."""
    num_warps: int
    num_stages: int
    """Chunks that are in flight at once."""


@dataclass(frozen=True)
class Plan:
    """What is launched: one kernel, and a merge if there are several splits."""

    form: Form
    config: Config
    splits: int
    tokens_per_split: int
    """A multiple of the block; the last split has the rest, never nothing."""


def config_of(form: Form, dtype: DType) -> Config:
    """Block sizes of a form, the largest that compile without spilling for each architecture (docs/kernels.md)."""
    return _CONFIGS[form, dtype == "fp32"]


def choose(problem: Problem, multiprocessors: int, form: Form | None = None, splits: int | None = None) -> Plan:
    """The plan with the smallest estimated time; of equals the one with fewer splits.

    Args:
        problem: the sizes.
        multiprocessors: of the GPU.
        form: only plans of this form.
        splits: only plans of at most so many splits; rounding up to whole blocks may leave fewer.
    """
    forms = FORMS if form is None else (form,)
    plans = (plan for candidate in forms for plan in _plans(problem, candidate, splits))
    return min(plans, key=lambda plan: (estimated_microseconds(problem, plan, multiprocessors), plan.splits))


def estimated_microseconds(problem: Problem, plan: Plan, multiprocessors: int) -> float:
    """Time of a plan if only its multiply-adds counted, and its merge."""
    rounds = _ceil_div(problem.programs_per_split * plan.splits, multiprocessors)
    blocks = plan.tokens_per_split // plan.config.block_tokens
    work = rounds * blocks * multiply_adds_per_block(problem, plan.form, plan.config.block_tokens)
    merging = _MERGE_MICROSECONDS if plan.splits > 1 else 0.0
    return work / _MULTIPLY_ADDS_PER_MICROSECOND[problem.dtype] + merging


def multiply_adds_per_block(problem: Problem, form: Form, block_tokens: int) -> int:
    """Multiply-adds of one program for one block of n tokens; padding to whole blocks is computed like the rest."""
    queries, dim, width, n = problem.block_queries, problem.head_dim, problem.width, block_tokens
    if form == "projected":
        return 2 * n * width * dim + 2 * queries * n * dim
    return 2 * queries * width * (n + dim)


def _plans(problem: Problem, form: Form, at_most: int | None) -> Iterator[Plan]:
    config = config_of(form, problem.dtype)
    blocks = _ceil_div(problem.tokens, config.block_tokens)
    for wanted in range(1, blocks + 1) if at_most is None else [min(at_most, blocks)]:
        per_split = _ceil_div(blocks, wanted)
        yield Plan(form, config, _ceil_div(blocks, per_split), per_split * config.block_tokens)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_CONFIGS = {
    # (form, fp32)
    ("projected", False): Config(64, 32, 4, 3),
    ("absorbed", False): Config(128, 32, 4, 3),
    ("projected", True): Config(32, 32, 8, 2),
    ("absorbed", True): Config(64, 32, 4, 2),
}
