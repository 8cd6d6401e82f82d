"""Kernels compiled ahead of time, for GPUs that are not here: in a process of its own, which interprets none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

ARCHITECTURES = (80, 90)  # the oldest and one of the newest; the rows in benchmarks/results have all

PROGRAM = """
import json, sys
from dataclasses import asdict
from blipstream_kernels.aot import PUBLISHED, assemble, compile_attention, compile_merge, measure
from blipstream_kernels.plan import Plan, config_of

architecture = int(sys.argv[1])
problem = PUBLISHED[0]
config = config_of("absorbed", problem.dtype)
whole = compile_attention(problem, Plan("absorbed", config, 1, 384), architecture)
split = compile_attention(problem, Plan("projected", config_of("projected", problem.dtype), 5, 64), architecture)
kernels = [whole, split, compile_merge(problem, 5, architecture)]
print(json.dumps({
    "rows": [asdict(row) for row in measure([architecture], [PUBLISHED[0], PUBLISHED[-1]])],
    "kernels": [asdict(kernel) | {"usage": asdict(assemble(kernel))} for kernel in kernels],
}))
"""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(request.param)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_spills_and_no_launch_asks_for_more_shared_memory(compiled: Mapping[str, Any]) -> None:
    assert {row["kernel"] for row in compiled["rows"]} == {"absorbed", "projected", "merge"}
    for row in compiled["rows"]:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 48 << 10, row


@pytest.mark.parametrize(
    ("index", "parameters"),
    [
        (0, ["query", "image", "key_weight", "value_weight", "value_bias", "output"]),
        (1, ["query", "image", "key_weight", "value_weight", "output", "statistics"]),
        (2, ["partial", "statistics", "value_bias", "output"]),
    ],
)
def test_the_parameters_are_inputs_before_outputs_and_nothing_is_hidden(
    index: int, parameters: list[str], compiled: Mapping[str, Any]
) -> None:
    kernel = compiled["kernels"][index]
    assert kernel["parameters"] == parameters
    declared = re.search(rf"\.entry {kernel['name']}\((.*?)\)", kernel["ptx"], re.DOTALL)
    assert declared is not None
    assert re.findall(r"\.param \.([a-z]\d+)", declared[1]) == ["u64"] * len(parameters)
    for number in range(len(parameters)):  # each is read
        assert len(re.findall(rf"\b{kernel['name']}_param_{number}\b", kernel["ptx"])) >= 2
    assert kernel["usage"]["spill_bytes"] == 0


CODE = ".visible .entry f(\n .param .u64 f_param_0,\n .param .u64 f_param_1\n)\n{\n ld.param.u64 %rd1, [f_param_0];\n}"


def test_hidden_parameters_are_taken_away_unless_the_code_reads_them() -> None:
    from blipstream_kernels.aot import without_hidden_parameters

    from blipstream.errors import KernelInputError

    assert "f_param_1" not in without_hidden_parameters(CODE, "f", 1)
    assert without_hidden_parameters(CODE, "f", 2).count("f_param_1") == 1
    with pytest.raises(KernelInputError, match="the code of f reads its hidden parameter f_param_0"):
        without_hidden_parameters(CODE, "f", 0)
    with pytest.raises(KernelInputError, match="f declares 2 parameters; expected at least 3"):
        without_hidden_parameters(CODE, "f", 3)
    with pytest.raises(KernelInputError, match="the code has no entry 'g'"):
        without_hidden_parameters(CODE, "g", 1)
