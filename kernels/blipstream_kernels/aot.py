"""Ahead-of-time compilation: kernels as PTX for a GPU that need not be there, and what they take of its registers.

``python -m blipstream_kernels.aot FILE.csv`` compiles every kernel that is chosen for the published models, for each
architecture, appends a row for each to the file, and prints the table of docs/kernels.md. ``TRITON_INTERPRET`` must not
be set: the interpreter compiles nothing.

A kernel compiled here has its sizes built in. What is left are its pointers, inputs before outputs, in the order of
TensorRT's ahead-of-time plugins. Triton's compiler adds pointers to scratch memory at the end, which a launcher of its
own passes and others do not; no kernel here uses them, and :func:`without_hidden_parameters` takes them away.
"""

from __future__ import annotations

import csv
import datetime as dt
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from blipstream.errors import KernelInputError
from blipstream_kernels.absorbed import absorbed
from blipstream_kernels.launch import MERGE_BLOCK_Q, MERGE_WARPS
from blipstream_kernels.merge import merge
from blipstream_kernels.plan import FORMS, Config, DType, Form, Plan, Problem, choose, config_of
from blipstream_kernels.projected import projected
from blipstream_kernels.tiles import INTERPRETED

ARCHITECTURES = (80, 86, 87, 89, 90, 100)
"""Compute capabilities: A100, A10 and RTX 30, Orin, L4 and RTX 40, H100 and H200, B200."""

STATIC_SHARED_BYTES = 48 << 10
"""Shared memory of a block that a launch gets without asking the driver for more."""

_MULTIPROCESSORS = {80: 108, 86: 72, 87: 16, 89: 58, 90: 132, 100: 148}
"""Of A100, A10, Orin 64 GB, L4, H100 and B200."""
_KERNELS = {"projected": projected, "absorbed": absorbed}
_THREADS_PER_WARP = 32


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        name: of its entry.
        ptx: its code, whose parameters are ``parameters`` and nothing else.
        architecture: compute capability, as 90 for 9.0.
        num_warps: of a block.
        shared_bytes: dynamic shared memory of a block.
        parameters: names of its pointers, in their order.
    """

    name: str
    ptx: str
    architecture: int
    num_warps: int
    shared_bytes: int
    parameters: tuple[str, ...]

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.num_warps * _THREADS_PER_WARP


@dataclass(frozen=True)
class Usage:
    """What the assembler made of a kernel.

    Attributes:
        registers: of a thread.
        spill_bytes: of a thread: what did not fit into registers and is stored and loaded.
    """

    registers: int
    spill_bytes: int


def compile_attention(problem: Problem, plan: Plan, architecture: int, scale: float | None = None) -> Compiled:
    """The kernel of a plan, for contiguous tensors and no mask.

    With one split it reads (query, image, key_weight, value_weight, value_bias) and writes (output); with several it
    reads (query, image, key_weight, value_weight) and writes (output, statistics) for :func:`compile_merge`. The grid
    is (B * H, splits, ceil(Q / BLOCK_Q)); the batch is not built in.

    Args:
        problem: the sizes.
        plan: form, blocks and splits.
        architecture: compute capability, as 90 for 9.0.
        scale: factor of the scores; by default D ** -0.5.

    Raises:
        KernelInputError: this process interprets kernels (``TRITON_INTERPRET``) and compiles none.
    """
    pointer, whole = f"*{problem.dtype}", plan.splits == 1
    names = ["query", "image", "key_weight", "value_weight"]
    types = dict.fromkeys([*names, "value_bias", "output"] if whole else names, pointer)
    if not whole:
        types |= {"output": "*fp32", "statistics": "*fp32"}
    hidden = problem.heads * problem.head_dim
    constants = {
        "value_bias": None,
        "key_mask": None,
        "statistics": None,
        "tokens": problem.tokens,
        "tokens_per_split": plan.tokens_per_split,
        "query_stride_b": problem.queries * hidden,
        "query_stride_q": hidden,
        "image_stride_b": problem.tokens * problem.width,
        "image_stride_n": problem.width,
        "key_weight_stride": problem.width,
        "value_weight_stride": problem.width,
        "mask_stride_b": 0,
        "heads": problem.heads,
        "queries": problem.queries,
        "width": problem.width,
        "SCALE": problem.head_dim**-0.5 if scale is None else scale,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_Q": problem.block_queries,
        "BLOCK_N": plan.config.block_tokens,
        "BLOCK_C": plan.config.block_width,
        "EVEN_C": problem.width % plan.config.block_width == 0,
        "PRECISION": "ieee",
    }
    return _compile(_KERNELS[plan.form], types, constants, architecture, plan.config.num_warps, plan.config.num_stages)


def compile_merge(problem: Problem, splits: int, architecture: int) -> Compiled:
    """The kernel that joins splits: it reads (partial, statistics, value_bias) and writes (output).

    The grid is (B * H, ceil(Q / MERGE_BLOCK_Q)); arguments are those of :func:`compile_attention`.
    """
    pointer = f"*{problem.dtype}"
    types = {"partial": "*fp32", "statistics": "*fp32", "value_bias": pointer, "output": pointer}
    constants = {
        "splits": splits,
        "heads": problem.heads,
        "queries": problem.queries,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_Q": MERGE_BLOCK_Q,
    }
    return _compile(merge, types, constants, architecture, MERGE_WARPS, 1)


def _compile(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    if INTERPRETED.value:
        raise KernelInputError("TRITON_INTERPRET is set, and a process that interprets kernels cannot compile them")
    names: Sequence[str] = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {name: constants[name] for name in names if name not in types},
        # TensorRT aligns tensors to 256 bytes and torch to 512.
        {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in types},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, _THREADS_PER_WARP), options=options)
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise AssertionError(f"{made.metadata.name} wants scratch memory, which nobody passes")
    parameters = tuple(name for name in names if name in types)
    return Compiled(
        name=made.metadata.name,
        ptx=without_hidden_parameters(made.asm["ptx"], made.metadata.name, len(parameters)),
        architecture=architecture,
        num_warps=made.metadata.num_warps,
        shared_bytes=made.metadata.shared,
        parameters=parameters,
    )


def without_hidden_parameters(ptx: str, name: str, count: int) -> str:
    """Leave only the first ``count`` parameters of the entry ``name``.

    Raises:
        KernelInputError: there is no such entry, it has fewer, or its code reads one of the others.
    """
    entry = re.search(rf"(\.entry\s+{re.escape(name)}\s*\()(.*?)(\n?\))", ptx, re.DOTALL)
    if entry is None:
        raise KernelInputError(f"the code has no entry {name!r}")
    declared = [part.strip() for part in entry[2].split(",")]
    if len(declared) < count:
        raise KernelInputError(f"{name} declares {len(declared)} parameters; expected at least {count}")
    body = ptx[entry.end() :]
    for hidden in (one.split()[-1] for one in declared[count:]):
        if re.search(rf"\b{re.escape(hidden)}\b", body):
            raise KernelInputError(f"the code of {name} reads its hidden parameter {hidden}")
    kept = ",\n\t".join(declared[:count])
    return f"{ptx[: entry.start()]}{entry[1]}\n\t{kept}\n){body}"


def assemble(compiled: Compiled) -> Usage:
    """Assemble the code, and say what it takes.

    Raises:
        KernelInputError: the assembler refuses it; its first line is in the message.
    """
    target = re.search(r"^\.target\s+([\w]+)", compiled.ptx, re.MULTILINE)
    if target is None:
        raise KernelInputError(f"the code of {compiled.name} names no target")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.ptx, encoding="utf-8")
        command = [get_ptxas(compiled.architecture).path, "-v", f"--gpu-name={target[1]}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".cubin"))], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise KernelInputError(f"{compiled.name} is not assembled: {done.stderr.strip().splitlines()[0]}")
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    return Usage(int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))))


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture."""

    date: str
    triton: str
    kernel: str
    dtype: DType
    architecture: str
    tokens: int
    splits: int
    block_tokens: int
    block_width: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int


PUBLISHED = tuple(
    Problem(batch=1, heads=12, queries=32, tokens=tokens, width=1408, head_dim=64, dtype=dtype)
    for dtype in ("fp16", "bf16", "fp32")
    for tokens in (257, 677)
)
"""BLIP-2's cross-attention at 224 and 364 pixels."""


def measure(architectures: Sequence[int], problems: Sequence[Problem] = PUBLISHED) -> Iterator[Row]:
    """Compile and assemble what runs the problems: each form, whole and as it is split for one image, and merges."""
    now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    for architecture in architectures:
        for problem in problems:
            for plan in _plans(problem, architecture):
                attention = compile_attention(problem, plan, architecture)
                yield _row(now, problem, plan, attention, plan.config)
                if plan.splits > 1:
                    merging = Config(problem.tokens, problem.head_dim, MERGE_WARPS, 1)
                    yield _row(now, problem, plan, compile_merge(problem, plan.splits, architecture), merging)


def _plans(problem: Problem, architecture: int) -> Iterator[Plan]:
    form: Form
    for form in FORMS:
        config = config_of(form, problem.dtype)
        yield Plan(form, config, 1, -(-problem.tokens // config.block_tokens) * config.block_tokens)
        split = choose(problem, _MULTIPROCESSORS[architecture], form)
        if split.splits > 1:
            yield split


def _row(now: str, problem: Problem, plan: Plan, compiled: Compiled, config: Config) -> Row:
    return Row(
        date=now,
        triton=triton.__version__,
        kernel=compiled.name,
        dtype=problem.dtype,
        architecture=f"sm_{compiled.architecture}",
        tokens=problem.tokens,
        splits=plan.splits,
        **asdict(config),
        **asdict(assemble(compiled)),
        shared_bytes=compiled.shared_bytes,
    )


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """What the documentation shows of the rows of a CSV file, as Markdown.

    A line for each kernel and type: over all plans, the most registers, bytes spilled and shared memory, for each
    architecture.
    """
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    lines = ["| kernel | type | " + " | ".join(architectures) + " |", "|---|---|" + "---|" * len(architectures)]
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        cells = []
        for architecture in architectures:
            wanted = (kernel, dtype, architecture)
            same = [row for row in rows if (row["kernel"], row["dtype"], row["architecture"]) == wanted]
            registers, spilled, shared = (
                max(int(row[name]) for row in same) for name in ("registers", "spill_bytes", "shared_bytes")
            )
            cells.append(f"{registers} / {spilled} / {shared / 1024:.1f}")
        lines.append(f"| {kernel} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Append the rows to the CSV file that is named."""
    path = Path(arguments[0])
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in measure(ARCHITECTURES):
            writer.writerow(asdict(row))
            file.flush()
    with path.open(newline="", encoding="utf-8") as file:
        print(table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main(sys.argv[1:])
