"""The fused cross-attention against what torch has: ``python -m benchmarks.kernels`` on a machine with an NVIDIA GPU.

Every system computes the same thing: keys and values of the image tokens, and the attention of the projected queries to
them. A row is one system for one batch, number of image tokens and type; its ratio is over projections and
``scaled_dot_product_attention`` in the same run. Rows go to ``benchmarks/results/kernels.csv``, or to ``--rows``, each
as it is measured. The exit status is 1 when a system fails or its result is not that of the others.

``--device cpu`` rehearses it with tiny sizes: the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), and no
row is kept. ``--costs`` measures nothing, and prints the table of multiply-adds and bytes in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # as torch's own documentation has it
import triton
from blipstream_kernels.launch import cross_attention, multiprocessors
from blipstream_kernels.plan import FORMS, Form, Problem, choose, config_of, multiply_adds_per_block
from blipstream_kernels.tiles import INTERPRETED
from torch import Tensor

from benchmarks.gpu.limits import TORCH_DTYPES, copy_bandwidth, matmul_rate
from benchmarks.gpu.status import DONE, FAILED, MISUSED, NO_GPU
from benchmarks.gpu.timing import measure
from benchmarks.run import RESULTS
from benchmarks.setting import cpu_model

FILE = RESULTS / "kernels.csv"
BATCHES = (1, 2, 4, 8, 16, 32)
IMAGE_TOKENS = (257, 677)
DTYPES = ("fp16", "bf16")
PUBLISHED = Problem(batch=1, heads=12, queries=32, tokens=257, width=1408, head_dim=64, dtype="fp16")
TINY = Problem(batch=1, heads=2, queries=5, tokens=20, width=24, head_dim=16, dtype="fp16")
SDPA, COMPILED, REGROUPED, FUSED = "sdpa", "compiled", "regrouped", "fused"
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one problem."""

    query: Tensor
    image: Tensor
    weight: Tensor
    """(2 * H * D, C), of keys and values, as the models hold them."""
    bias: Tensor
    problem: Problem

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the keys, and of the values."""
        (key_weight, value_weight), (key_bias, value_bias) = self.weight.chunk(2), self.bias.chunk(2)
        return key_weight, key_bias, value_weight, value_bias


@dataclass(frozen=True)
class System:
    """Something that computes the cross-attention.

    Attributes:
        name: as in the rows.
        run: from inputs to (B, Q, H * D).
        form: of a fused kernel; the planner's choice where it chose.
        splits: of its tokens, likewise.
    """

    name: str
    run: Callable[[Inputs], Tensor]
    form: str = ""
    splits: int = 0


@dataclass(frozen=True)
class Row:
    """One system for one problem."""

    date: str
    device: str
    torch: str
    triton: str
    command: str
    batch: int
    image_tokens: int
    dtype: str
    system: str
    form: str
    splits: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    sdpa_ratio: float
    """Time of projections and ``scaled_dot_product_attention`` in this run, over that of this row."""
    gigabytes_per_second: float
    """Bytes that have to be moved at least, over the time."""
    of_bandwidth: float
    """The same, of what a copy reaches in this run."""
    teraflops: float
    """Operations of the usual form, keys and values computed, whatever this system computes."""
    of_matmul: float
    """The same, of what a product of large matrices reaches in this run."""
    difference: float
    """Largest difference from fp32, relative to its largest value."""
    agrees: bool
    """Whether that is at most twice that of ``sdpa``, and an ulp."""


def draw(problem: Problem, device: str) -> Inputs:
    """Inputs of a problem, of the size that activations have."""
    torch.manual_seed(0)
    hidden, dtype = problem.heads * problem.head_dim, TORCH_DTYPES[problem.dtype]
    shapes = (
        (problem.batch, problem.queries, hidden),
        (problem.batch, problem.tokens, problem.width),
        (2 * hidden, problem.width),
        (2 * hidden,),
    )
    query, image, weight, bias = (torch.randn(shape, device=device) for shape in shapes)
    weight *= problem.width**-0.5
    return Inputs(*(tensor.to(dtype) for tensor in (query, image, weight, bias)), problem)


def sdpa(inputs: Inputs) -> Tensor:
    """The usual way: one product for keys and values, then torch's fused attention."""
    problem = inputs.problem
    keys, values = F.linear(inputs.image, inputs.weight, inputs.bias).chunk(2, dim=-1)
    q, k, v = (_heads(tensor, problem) for tensor in (inputs.query, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _heads(flat: Tensor, problem: Problem) -> Tensor:
    """(B, L, H * D) -> (B, H, L, D)"""
    return flat.unflatten(2, (problem.heads, problem.head_dim)).transpose(1, 2)


def regrouped(inputs: Inputs) -> Tensor:
    """The absorbed form as four matrix products and a softmax, without a fused kernel.

    By ``einsum``, which makes all heads' queries the rows of one product with an image: ``matmul`` would copy the image
    for each head, and the weights for each image.
    """
    problem = inputs.problem
    key_weight, _, value_weight, value_bias = inputs.parts
    w_k, w_v = (weight.unflatten(0, (problem.heads, problem.head_dim)) for weight in (key_weight, value_weight))
    query = inputs.query.unflatten(2, (problem.heads, problem.head_dim)) * problem.head_dim**-0.5
    reading = torch.einsum("bqhd,hdc->bhqc", query, w_k)
    weights = torch.einsum("bhqc,bnc->bhqn", reading, inputs.image).softmax(-1)
    mean = torch.einsum("bhqn,bnc->bhqc", weights, inputs.image)
    return torch.einsum("bhqc,hdc->bqhd", mean, w_v).flatten(2) + value_bias


def compiled(**options: Any) -> Callable[[Inputs], Tensor]:
    """:func:`sdpa` by ``torch.compile``, for the sizes that it meets first.

    What was compiled before is forgotten: after eight sizes of one function torch would compile no other, and run it
    eagerly instead.
    """
    torch.compiler.reset()
    run: Callable[[Inputs], Tensor] = torch.compile(sdpa, dynamic=False, **options)
    return run


def fused(form: Form | None, splits: int | None) -> Callable[[Inputs], Tensor]:
    """A fused kernel; by default what the planner chooses."""

    def run(inputs: Inputs) -> Tensor:
        key_weight, key_bias, value_weight, value_bias = inputs.parts
        return cross_attention(
            inputs.query,
            inputs.image,
            key_weight,
            key_bias,
            value_weight,
            value_bias,
            inputs.problem.heads,
            form=form,
            splits=splits,
        )

    return run


def systems(problem: Problem, device: str) -> Iterator[System]:
    """What is measured for a problem: the yardstick first, then its peers, then every plan of the fused kernels."""
    yield System(SDPA, sdpa)
    if device == "cuda":
        yield System(COMPILED, compiled(mode="max-autotune-no-cudagraphs"))
    yield System(REGROUPED, regrouped)
    plan = choose(problem, multiprocessors(torch.device(device)))
    yield System(FUSED, fused(None, None), plan.form, plan.splits)
    for form in FORMS:
        for splits in split_counts(problem, form):
            yield System(f"{FUSED} {form} {splits}", fused(form, splits), form, splits)


def split_counts(problem: Problem, form: Form) -> list[int]:
    """Different numbers of splits that whole blocks of tokens can make: 1, 2, 4, ... and each block alone."""
    blocks = -(-problem.tokens // config_of(form, problem.dtype).block_tokens)
    wanted = sorted({*(1 << power for power in range(blocks.bit_length())), blocks})
    return sorted({choose(problem, 1, form, count).splits for count in wanted})


def least_bytes(problem: Problem) -> int:
    """Bytes of the tensors that are read and written once."""
    hidden = problem.heads * problem.head_dim
    moved = problem.batch * (2 * problem.queries * hidden + problem.tokens * problem.width)
    return _itemsize(problem) * (moved + 2 * hidden * problem.width + 2 * hidden)


def key_value_bytes(problem: Problem) -> int:
    """Bytes of the keys and values, written and read, which the fused kernels spare."""
    return 2 * _itemsize(problem) * problem.batch * 2 * problem.tokens * problem.heads * problem.head_dim


def _itemsize(problem: Problem) -> int:
    return torch.finfo(TORCH_DTYPES[problem.dtype]).bits // 8


def usual_multiply_adds(problem: Problem) -> int:
    """Of the usual form, keys and values computed."""
    hidden = problem.heads * problem.head_dim
    return problem.batch * problem.tokens * 2 * hidden * (problem.width + problem.queries)


def absorbed_multiply_adds(problem: Problem) -> int:
    """Of the absorbed form over whole images, nothing padded."""
    rows = problem.batch * problem.heads * problem.queries
    return 2 * rows * problem.width * (problem.tokens + problem.head_dim)


def launched_multiply_adds(problem: Problem, form: Form) -> int:
    """Of a form as its kernel computes it: block by block, the last one padded."""
    length = config_of(form, problem.dtype).block_tokens
    blocks = -(-problem.tokens // length)
    return problem.programs_per_split * blocks * multiply_adds_per_block(problem, form, length)


def costs() -> str:
    """Multiply-adds and bytes of one image of the published shapes in half precision, as Markdown."""
    lines = [
        "| image tokens | usual | *absorbed*, nothing padded | *projected* as launched | *absorbed* as launched "
        "| read and written at least | keys and values beside |",
        "|---|---|---|---|---|---|---|",
    ]
    for problem in (replace(PUBLISHED, tokens=tokens) for tokens in IMAGE_TOKENS):
        work = (
            usual_multiply_adds(problem),
            absorbed_multiply_adds(problem),
            *(launched_multiply_adds(problem, form) for form in FORMS),
        )
        moved = (least_bytes(problem), key_value_bytes(problem))
        cells = [*(f"{count / 1e6:.0f} M" for count in work), *(f"{count / 1e6:.1f} MB" for count in moved)]
        lines.append(f"| {problem.tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(found: Tensor, inputs: Inputs) -> float:
    """Largest difference from the same in fp32, relative to its largest value."""
    wide = Inputs(*(getattr(inputs, name).float() for name in ("query", "image", "weight", "bias")), inputs.problem)
    truth = sdpa(wide)
    return float((found.float() - truth).abs().max() / truth.abs().max())


@dataclass(frozen=True)
class Bench:
    """One run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        seconds: for each system.
        command: as it was given.
        bandwidth: GB/s of a copy.
        flops: TFLOP/s of a matrix product, of each type.
    """

    device: str
    seconds: float
    command: str
    bandwidth: float
    flops: dict[str, float]

    def rows(self, problem: Problem) -> Iterator[Row | None]:
        """Measure every system on a problem; None for one that fails, whose fault is printed."""
        inputs = draw(problem, self.device)
        yardstick: Row | None = None
        for system in systems(problem, self.device):
            try:
                row = self.row(system, inputs, yardstick)
            except Exception as fault:  # of whatever kind: no system takes the others along
                if yardstick is None:
                    raise
                print(f"benchmarks.kernels: {system.name} fails on {problem}: {fault!r}", file=sys.stderr)
                yield None
                continue
            yardstick = yardstick or row
            yield row

    def row(self, system: System, inputs: Inputs, yardstick: Row | None) -> Row:
        """Measure one system; the yardstick is None for the yardstick itself."""
        problem = inputs.problem
        error = difference(system.run(inputs), inputs)  # compiles as well
        median, p20, p80 = self.time(lambda: system.run(inputs))
        rate, flops = least_bytes(problem) / median / 1e6, 2 * usual_multiply_adds(problem) / median / 1e9
        allowed = 2 * (yardstick.difference if yardstick else error) + torch.finfo(TORCH_DTYPES[problem.dtype]).eps
        return Row(
            date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            device=device_name(self.device),
            torch=torch.__version__,
            triton=triton.__version__,
            command=self.command,
            batch=problem.batch,
            image_tokens=problem.tokens,
            dtype=problem.dtype,
            system=system.name,
            form=system.form,
            splits=system.splits,
            median_ms=round(median, 5),
            p20_ms=round(p20, 5),
            p80_ms=round(p80, 5),
            sdpa_ratio=round((yardstick.median_ms if yardstick else median) / median, 3),
            gigabytes_per_second=round(rate, 2),
            of_bandwidth=round(rate / self.bandwidth, 4),
            teraflops=round(flops, 3),
            of_matmul=round(flops / self.flops[problem.dtype], 4),
            difference=float(f"{error:.2g}"),
            agrees=error <= allowed,  # a NaN does not
        )

    def time(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """Median and quantiles in milliseconds, with a cold cache on a GPU."""
        if self.device == "cuda":
            found = triton.testing.do_bench(run, rep=int(self.seconds * 1000), quantiles=list(QUANTILES))
            return tuple(found)
        row = measure("", "", 0, run, seconds=self.seconds)
        return row.p50, row.p20, row.p80


def device_name(device: str) -> str:
    """As its driver names it."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def problems(device: str) -> Iterator[Problem]:
    """What is measured, the most wanted first."""
    if device == "cpu":
        yield TINY
        return
    for tokens in IMAGE_TOKENS:
        for dtype in DTYPES:
            for batch in BATCHES:
                yield replace(PUBLISHED, batch=batch, tokens=tokens, dtype=dtype)  # type: ignore[arg-type]


def append(rows: Sequence[Row], path: Path) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def show(row: Row) -> str:
    """A line to read."""
    return (
        f"batch {row.batch:2d}, {row.image_tokens} tokens, {row.dtype}: {row.system:20s} "
        f"{row.median_ms:9.4f} ms, {row.sdpa_ratio:.2f} x sdpa, {row.of_bandwidth:.0%} of bandwidth, "
        f"{row.of_matmul:.0%} of matmul, error {row.difference:.1e}{'' if row.agrees else ': WRONG'}"
    )


def refusal(device: str) -> tuple[int, str] | None:
    """Exit status and reason where nothing can be measured."""
    if device == "cuda" and not torch.cuda.is_available():
        return NO_GPU, "torch sees no NVIDIA GPU, and the kernels are measured on one"
    if device == "cuda" and INTERPRETED.value:
        return MISUSED, "TRITON_INTERPRET is set, and times of interpreted kernels say nothing"
    if device == "cpu" and not INTERPRETED.value:
        return MISUSED, "a rehearsal on the CPU needs TRITON_INTERPRET=1"
    return None


def run(device: str, seconds: float, command: str, path: Path) -> int:
    """Measure everything, print it, and keep the rows of a GPU; return the exit status."""
    bench = Bench(
        device,
        seconds,
        command,
        copy_bandwidth(device, seconds).p50,
        {dtype: matmul_rate(device, dtype, seconds).p50 for dtype in (DTYPES if device == "cuda" else (TINY.dtype,))},
    )
    status = DONE
    for problem in problems(device):
        for row in bench.rows(problem):
            if row is None or not row.agrees:
                status = FAILED
            if row is None:
                continue
            print(show(row), flush=True)
            if device == "cuda":
                append([row], path)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each system and problem")
    parser.add_argument("--rows", type=Path, default=FILE, metavar="FILE.csv", help="where the rows of a GPU go")
    parser.add_argument("--costs", action="store_true", help="print multiply-adds and bytes, and measure nothing")
    options = parser.parse_args(arguments)
    if options.costs:
        print(costs())
        return DONE
    if refused := refusal(options.device):
        status, reason = refused
        print(f"benchmarks.kernels: {reason}", file=sys.stderr)
        return status
    command = " ".join(["python -m benchmarks.kernels", *(sys.argv[1:] if arguments is None else arguments)])
    return run(options.device, options.seconds, command, options.rows)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
