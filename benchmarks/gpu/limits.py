"""What the device gives at most: copy bandwidth, and the rate of large matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.job import Job, parse
from benchmarks.gpu.rows import COPY, MATMUL, Row
from benchmarks.gpu.timing import measure, rate

SYSTEM = "torch"
_COPIED = {"cuda": 1 << 30, "cpu": 64 << 20}
"""Bytes that are copied: far more than any cache holds."""
_SIDE = {"cuda": 8192, "cpu": 512}
"""Of the square matrices."""
_INNER = 10
"""Operations between two looks at the clock."""
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def synchronizer(device: str) -> Callable[[], None]:
    """What waits until the device has done all that it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def copy_bandwidth(device: str, seconds: float) -> Row:
    """GB/s of a copy within the device's memory, read and written bytes together."""
    count = _COPIED[device]
    source = torch.empty(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    row = measure(SYSTEM, COPY, 0, _repeated(lambda: target.copy_(source), device), seconds=seconds, inner=_INNER)
    return rate(row, 2 * count / 1e9, "GB/s")


def matmul_rate(device: str, dtype: str, seconds: float) -> Row:
    """TFLOP/s of a product of two square matrices."""
    side = _SIDE[device]
    left, right = (torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    run = _repeated(lambda: torch.mm(left, right, out=out), device)
    row = measure(SYSTEM, f"{MATMUL} {dtype}", 0, run, seconds=seconds, inner=_INNER)
    return rate(row, 2 * side**3 / 1e12, "TFLOP/s")


def _repeated(operation: Callable[[], object], device: str) -> Callable[[], None]:
    wait = synchronizer(device)

    def run() -> None:
        for _ in range(_INNER):
            operation()
        wait()

    return run


def main(job: Job) -> None:
    """Measure what the roofline needs."""
    job.keep([copy_bandwidth(job.device, job.seconds)])
    for dtype in ("fp16", "bf16") if job.device == "cuda" else (job.dtype,):
        job.keep([matmul_rate(job.device, dtype, job.seconds)])


if __name__ == "__main__":
    with torch.inference_mode():
        main(parse()[0])
