"""Machines that the report of a GPU is made for."""

from __future__ import annotations

from benchmarks.gpu.environment import Environment

DATE = "2026-01-02T03:04:05+00:00"
NOTHING = Environment(DATE, cpu="model", cores=2, versions={"torch": "2.13.0+cpu"})
DATA_CENTRE = Environment(
    DATE,
    gpu="NVIDIA Some GPU",
    compute_capability="9.0",
    gpu_memory=80 << 30,
    driver="615.1",
    torch_cuda="13.0",
    torch_sees_gpu=True,
    tensorrt="11.4.0.106",
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    versions={"torch": "2.13.0"},
)
