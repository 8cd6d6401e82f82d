"""Plugins written in Python register with TensorRT, and answer what its builder asks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from tests.tensorrt.rehearsal import Input, Launch, Rehearsal, rehearse
from tests.tensorrt.standins import Bindings, StandinError

MOST_THREADS = 1024  # per block, on every GPU that CUDA 13 knows
WIDEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)


@dataclass(frozen=True)
class Plugin:
    """A plugin under test.

    Attributes:
        module: what registers it.
        inputs: over the profile that it is rehearsed with.
        attributes: values for it.
        fields: the types of its attributes, by names of ``tensorrt.PluginFieldType``.
    """

    module: str
    inputs: tuple[Input, ...]
    attributes: Mapping[str, object]
    fields: Mapping[str, str]


QUERIES, TOKENS, HEADS, WIDTH, SPLITS = 32, 257, 12, 1408, 3
BATCHES = (1, 4, 8)


def rows(per_image: int, width: int, type_: str) -> Input:
    """A flat tensor of BLIP-2's Q-Former, over a profile of one to eight images."""
    smallest, optimal, largest = ((batch * per_image, width) for batch in BATCHES)
    return Input(type_, (smallest, optimal, largest))


def fixed(type_: str, *shape: int) -> Input:
    return Input(type_, (shape, shape, shape))


def fused(type_: str) -> tuple[Input, ...]:
    """Query, image, and the weights of keys and values."""
    weight = fixed(type_, HEADS * 64, WIDTH)
    return rows(QUERIES, HEADS * 64, type_), rows(TOKENS, WIDTH, type_), weight, weight


KERNELS = "blipstream_kernels.plugin"
INTEGERS = {"heads": "INT64", "queries": "INT64", "architecture": "INT64"}
SIZES = {"heads": HEADS, "queries": QUERIES, "architecture": 90}
PARTIAL = Input("FLOAT", tuple((batch, HEADS, SPLITS, QUERIES, 64) for batch in BATCHES))  # type: ignore[arg-type]
STATISTICS = Input("FLOAT", tuple((batch, HEADS, SPLITS, 2, QUERIES) for batch in BATCHES))  # type: ignore[arg-type]

PLUGINS = {
    "blipstream::cross_attention": Plugin(
        module=KERNELS,
        inputs=(*fused("HALF"), fixed("HALF", HEADS * 64)),
        attributes={**SIZES, "tokens": TOKENS, "scale": 0.125},
        fields={**INTEGERS, "tokens": "INT64", "scale": "FLOAT64"},
    ),
    "blipstream::cross_attention_split": Plugin(
        module=KERNELS,
        inputs=fused("BF16"),
        attributes={**SIZES, "tokens": TOKENS, "splits": SPLITS, "scale": 0.125},
        fields={**INTEGERS, "tokens": "INT64", "splits": "INT64", "scale": "FLOAT64"},
    ),
    "blipstream::cross_attention_merge": Plugin(
        module=KERNELS,
        inputs=(PARTIAL, STATISTICS, fixed("HALF", HEADS * 64)),
        attributes={**SIZES, "splits": SPLITS},
        fields={**INTEGERS, "splits": "INT64"},
    ),
    "sample::scaled": Plugin(
        module="tests.tensorrt.samples.scaled",
        inputs=(Input("FLOAT", ((1, 5), (4, 64), (16, 64))),),
        attributes={"factor": 0.5},
        fields={"factor": "FLOAT64"},
    ),
}


@pytest.fixture(scope="module")
def rehearsed(lean_bindings: Bindings) -> Callable[[str], Rehearsal]:
    @functools.cache
    def run(name: str) -> Rehearsal:
        plugin = PLUGINS[name]
        return rehearse(lean_bindings, plugin.module, name, plugin.inputs, plugin.attributes)

    return run


@pytest.mark.parametrize("name", PLUGINS)
class TestEveryPlugin:
    def test_its_creator_is_in_the_registry(self, name: str, rehearsed: Callable[[str], Rehearsal]) -> None:
        assert rehearsed(name).fields == PLUGINS[name].fields

    def test_a_combination_has_a_type_for_each_input_and_output(
        self, name: str, rehearsed: Callable[[str], Rehearsal]
    ) -> None:
        found = rehearsed(name)
        assert found.combinations
        assert {len(row) for row in found.combinations} == {len(PLUGINS[name].inputs) + len(found.outputs)}

    def test_a_kernel_takes_inputs_extra_arguments_and_outputs_in_this_order(
        self, name: str, rehearsed: Callable[[str], Rehearsal]
    ) -> None:
        found = rehearsed(name)
        assert found.launches
        for launch in found.launches:
            expected = [64] * len(PLUGINS[name].inputs) + [32] * len(launch.arguments) + [64] * len(found.outputs)
            assert list(launch.parameters) == expected

    def test_a_launch_is_within_what_gpus_can(self, name: str, rehearsed: Callable[[str], Rehearsal]) -> None:
        for launch in rehearsed(name).launches:
            for grid, (x, y, z) in zip(launch.grid, launch.block, strict=True):
                assert all(1 <= blocks <= most for blocks, most in zip(grid, WIDEST_GRID, strict=True))
                assert 1 <= x * y * z <= MOST_THREADS
                assert launch.required_threads in (None, x * y * z)


def test_the_sample_is_launched_over_all_elements(rehearsed: Callable[[str], Rehearsal]) -> None:
    found = rehearsed("sample::scaled")
    assert found.outputs == (("FLOAT", ((1, 5), (4, 64), (16, 64))),)
    assert found.combinations == ((("FLOAT", "LINEAR"), ("FLOAT", "LINEAR")),)
    elements = (5, 256, 1024)
    for launch, threads in zip(found.launches, (128, 256), strict=True):
        assert launch.kernel == "scaled"
        assert launch.arguments == (elements,)
        assert launch.grid == tuple((-(-count // threads), 1, 1) for count in elements)
        assert launch.block == ((threads, 1, 1),) * 3
        assert launch.shared == (0, 0, 0)
        assert "mul.f32 %f1, %f0, 0f3F000000" in launch.code  # the factor, 0.5


def test_the_fused_cross_attention_is_launched_for_every_head_of_every_image(
    rehearsed: Callable[[str], Rehearsal],
) -> None:
    """Both forms are tactics, of which TensorRT measures which is faster."""
    whole, split = rehearsed("blipstream::cross_attention"), rehearsed("blipstream::cross_attention_split")
    for found, splits in ((whole, 1), (split, SPLITS)):
        assert [launch.kernel for launch in found.launches] == ["projected", "absorbed"]
        for launch in found.launches:
            assert launch.grid == tuple((batch * HEADS, splits, 1) for batch in BATCHES)
            assert launch.arguments == ()
            assert launch.shared[0] <= 48 << 10
    assert whole.outputs == (("HALF", tuple((batch * QUERIES, HEADS * 64) for batch in BATCHES)),)
    assert split.outputs == (("FLOAT", PARTIAL.shapes), ("FLOAT", STATISTICS.shapes))


def test_the_merge_is_launched_for_every_head_of_every_image(rehearsed: Callable[[str], Rehearsal]) -> None:
    found = rehearsed("blipstream::cross_attention_merge")
    (launch,) = found.launches
    assert launch.grid == tuple((batch * HEADS, 4, 1) for batch in BATCHES)
    assert found.outputs == (("HALF", tuple((batch * QUERIES, HEADS * 64) for batch in BATCHES)),)


@pytest.mark.parametrize("type_", ["FLOAT", "BF16"])
def test_the_fused_cross_attention_in_other_types(type_: str, lean_bindings: Bindings) -> None:
    plugin = PLUGINS["blipstream::cross_attention"]
    inputs = (*fused(type_), fixed(type_, HEADS * 64))
    found = rehearse(lean_bindings, KERNELS, "blipstream::cross_attention", inputs, plugin.attributes)
    assert found.outputs[0][0] == type_
    assert {len(launch.parameters) for launch in found.launches} == {6}


PLUGIN = """
    import numpy.typing
    import tensorrt.plugin as trtp

    @trtp.register("bad::bad")
    def describe(x: trtp.TensorDesc, size: int) -> trtp.TensorDesc:
        return x.like()

    @trtp.aot_impl("bad::bad")
    def implement(
        x: trtp.TensorDesc, size: int, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
        arguments = trtp.SymIntExprs(1)
        arguments[0] = trtp.SymInt32(x.shape_expr[0])
        return "kernel", "", trtp.KernelLaunchParams(grid_x=x.shape_expr[0]), arguments
"""

# What a plugin may not do, and what TensorRT says; each is PLUGIN with one piece replaced.
REFUSED = {
    "annotations are postponed": (
        "import numpy.typing",
        "from __future__ import annotations",
        "args should come first",
    ),
    "numpy.typing is not imported": ("import numpy.typing", "", "no attribute 'typing'"),
    "a default value": ("size: int)", "size: int = 1)", "Default values are not supported"),
    "no tactic": (", tactic: int", "", "does not match the expected input arg schema"),
    "a varying dimension as a constant": (
        "grid_x=x.shape_expr[0]",
        "grid_x=x.shape_expr[0].constant_value()",
        "non-constant",
    ),
    "a short extra argument": ("SymInt32", "SymInt8", "must be a 'tensorrt.plugin.SymInt32'"),
    "an extra argument without a value": ("arguments[0] = ", "unused = ", "must be a 'tensorrt.plugin.SymInt32'"),
    "no implementation": ("@trtp.aot_impl", "# ", "AOT implementation requested, but not defined"),
    "another plugin": ('"bad::bad"', '"bad::other"', "there is no plugin bad::bad in the registry"),
}


@pytest.mark.parametrize("case", ["nothing", *REFUSED])
def test_what_a_plugin_may_not_do(case: str, lean_bindings: Bindings, tmp_path: Path) -> None:
    old, new, text = REFUSED.get(case, ("", "", ""))
    assert old in PLUGIN
    (tmp_path / "bad_plugin.py").write_text(dedent(PLUGIN).replace(old, new))
    run = functools.partial(rehearse, lean_bindings.importing(tmp_path), "bad_plugin", "bad::bad")
    inputs = [Input("HALF", ((1, 5), (4, 5), (16, 5)))]
    if case == "nothing":
        assert run(inputs, {"size": 3}).launches[0].grid == ((1, 1, 1), (4, 1, 1), (16, 1, 1))
    else:
        with pytest.raises(StandinError, match=text):
            run(inputs, {"size": 3})


def test_the_parameters_of_a_kernel_are_read_off_its_code() -> None:
    declared = ".param .u64 .ptr .global .align 1 a,\n .param .u32 n\n"
    code = f".visible .entry other(.param .u64 a) {{}}\n.visible .entry f(\n {declared})\n{{}}"
    launch = Launch(0, "f", code, grid=(), block=(), shared=(), arguments=())
    assert launch.parameters == (64, 32)
    assert launch.required_threads is None
    with pytest.raises(ValueError, match="no entry 'g'"):
        _ = Launch(0, "g", code, grid=(), block=(), shared=(), arguments=()).parameters
