"""A small ahead-of-time plugin: ``sample::scaled`` multiplies a tensor by a factor.

TensorRT reads the annotations as objects, so they may not be postponed: no ``from __future__ import annotations``.
"""

import struct

import numpy.typing  # noqa: F401, ICN001  # tensorrt.plugin reads it and does not import it
import tensorrt as trt
import tensorrt.plugin as trtp

THREADS = {1: 128, 2: 256}  # per block, by tactic

# The parameters of a kernel are the inputs, then the extra arguments, then the outputs.
SOURCE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry scaled(.param .u64 x, .param .u32 count, .param .u64 y)
.reqntid {threads}, 1, 1
{{
    .reg .pred %past;
    .reg .b32 %r<5>;
    .reg .f32 %f<2>;
    .reg .b64 %a<5>;
    ld.param.u32 %r0, [count];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3;
    setp.ge.u32 %past, %r4, %r0;
    @%past ret;
    mul.wide.u32 %a0, %r4, {size};
    ld.param.u64 %a1, [x];
    cvta.to.global.u64 %a1, %a1;
    add.s64 %a2, %a1, %a0;
    ld.global.f32 %f0, [%a2];
    mul.f32 %f1, %f0, 0f{factor};
    ld.param.u64 %a3, [y];
    cvta.to.global.u64 %a3, %a3;
    add.s64 %a4, %a3, %a0;
    st.global.f32 [%a4], %f1;
    ret;
}}
"""


@trtp.register("sample::scaled")
def describe(x: trtp.TensorDesc, factor: float) -> trtp.TensorDesc:
    return x.like()


@trtp.autotune("sample::scaled")
def combinations(x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]) -> list[trtp.AutoTuneCombination]:
    return [trtp.AutoTuneCombination("FP32, FP32", "LINEAR", list(THREADS))]


@trtp.aot_impl("sample::scaled")
def implement(
    x: trtp.TensorDesc, factor: float, outputs: tuple[trtp.TensorDesc], tactic: int
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
    threads = THREADS[tactic]
    count = x.shape_expr.numel()
    launch = trtp.KernelLaunchParams(grid_x=trtp.cdiv(count, threads), block_x=threads)
    arguments = trtp.SymIntExprs(1)
    arguments[0] = trtp.SymInt32(count)
    code = SOURCE.format(
        threads=threads, size=trt.DataType.FLOAT.itemsize, factor=struct.pack(">f", factor).hex().upper()
    )
    return "scaled", code, launch, arguments
