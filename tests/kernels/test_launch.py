"""What the launcher refuses, each by its sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from blipstream_kernels.launch import cross_attention

from blipstream.errors import BlipstreamError, KernelInputError
from tests.kernels.problems import Inputs, draw

HEADS = 2


def change(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs.with_(**{name: how(getattr(inputs, name)) for name, how in changes.items()})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (change(query=lambda x: x[0]), r"query has shape \(5, 32\); expected \(B, Q, H \* D\)"),
        (change(query=lambda x: x[:, :0]), r"query has shape \(2, 0, 32\); .* none of them 0"),
        (change(image=lambda x: x[..., None]), r"image has shape \(2, 37, 40, 1\); expected \(B, N, C\)"),
        (change(image=lambda x: x[:1]), "image has a batch of 1; expected 2, as query has"),
        (change(query=lambda x: x.double()), "query is torch.float64; expected one of torch.float32"),
        (change(image=lambda x: x.half()), "image is torch.float16; expected torch.float32, as query is"),
        (change(value_bias=lambda x: x.half()), "value_bias is torch.float16; expected torch.float32"),
        (change(key_weight=lambda x: x[:-1]), r"key_weight has shape \(31, 40\); expected \(32, 40\)"),
        (change(value_weight=lambda x: x.T.contiguous()), r"value_weight has shape \(40, 32\); expected \(32, 40\)"),
        (change(key_bias=lambda x: x[:-1]), r"key_bias has shape \(31,\); expected \(32,\)"),
        (change(value_bias=lambda x: x[None]), r"value_bias has shape \(1, 32\); expected \(32,\)"),
        (change(image=lambda x: x.mT.contiguous().mT), "the last dimension of image has stride 37; expected 1"),
        (change(key_weight=lambda x: x.T.contiguous().T), "the last dimension of key_weight has stride 32; expected 1"),
        (change(image=lambda x: x.to("meta")), "image is on meta; expected cpu, where query is"),
        (change(key_mask=lambda x: x[:, :-1]), r"key_mask has shape \(2, 36\); expected \(2, 37\)"),
        (change(key_mask=lambda x: x.float()), "key_mask is torch.float32; expected bool, uint8, int32 or int64"),
        (lambda inputs: inputs.with_(num_heads=3), "query has 32 columns for 3 heads; expected heads of one of 16, 32"),
        (lambda inputs: inputs.with_(num_heads=4), "query has 32 columns for 4 heads; expected heads of one of 16, 32"),
        (lambda inputs: inputs.with_(num_heads=0), "query has 32 columns for 0 heads"),
        (lambda inputs: inputs.with_(scale=float("nan")), "scale is nan; expected a finite number"),
    ],
)
def test_bad_tensors_are_refused(fault: Callable[[Inputs], Inputs], message: str) -> None:
    inputs = fault(draw(heads=HEADS, masked=True))
    with pytest.raises(KernelInputError, match=message) as refused:
        cross_attention(*inputs.arguments)  # type: ignore[arg-type]
    assert isinstance(refused.value, BlipstreamError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "fused"}, "form is 'fused'; expected one of projected, absorbed, or None"),
        ({"splits": 0}, "splits is 0; expected at least 1, or None"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of ieee, tf32x3, tf32"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        cross_attention(*draw().arguments, **options)  # type: ignore[arg-type]


def test_compiled_kernels_refuse_tensors_of_the_cpu() -> None:
    code = "from tests.kernels.problems import draw; from blipstream_kernels.launch import cross_attention as run; "
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code + "run(*draw().arguments)"]
    environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "KernelInputError: query is on cpu; expected a CUDA device" in done.stderr
