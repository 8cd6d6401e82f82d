"""What the project uses of TensorRT is in NVIDIA's own bindings: names, keywords and numbers of arguments.

The bindings carry no types. ``pybind11-stubgen`` writes them out of the imported bindings, and mypy compares.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tensorrt.standins import BINDINGS, ROOT, Bindings

USERS = (
    "export/blipstream_export/plans/builder.py",
    "kernels/blipstream_kernels/plugin.py",
    "src/blipstream/engines/tensorrt.py",
    "tests/tensorrt/samples/scaled.py",
)
CODES = ("attr-defined", "call-arg", "name-defined", "misc")
"""Faults of an API's use. How the stubs type sequences and integers, as C++ does, is no fault."""

# One fault each, and what is said of it.
WRONG = {
    "trt.BuilderFlag.FP16": 'has no attribute "FP16"',
    "trt.AttentionNormalisation": 'no attribute "AttentionNormalisation"',
    "engine.get_binding_name(0)": 'no attribute "get_binding_name"',
    "engine.num_io_tensors = 1": 'Property "num_io_tensors".*is read-only',
    "config.max_workspace_size = 1": 'no attribute "max_workspace_size"',
    "trt.Builder(trt.Logger()).build_engine": 'no attribute "build_engine"',
    "trt.Builder(trt.Logger()).create_network(0).add_fully_connected": 'no attribute "add_fully_connected"',
    "trt.Builder(trt.Logger()).create_network(flag=0)": 'Unexpected keyword argument "flag"',
    "trt.Builder(trt.Logger()).create_optimization_profile(1)": "Too many arguments",
    "trt.Builder()": 'Missing positional argument "logger"',
    "trtp.implement('a::b')": 'no attribute "implement"',
    "tensor.alike()": 'no attribute "alike"',
}


@pytest.fixture(scope="module")
def stubs(bindings: Bindings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Types of ``tensorrt`` and ``tensorrt.plugin``."""
    folder = tmp_path_factory.mktemp("stubs")
    bindings.run("-m", "pybind11_stubgen", BINDINGS, "--ignore-all-errors", "-o", str(folder))
    written = folder / BINDINGS / "tensorrt.pyi"
    text = re.sub(r"\bin: ", "in_: ", written.read_text())  # two names and a default that only C++ has
    written.write_text(text.replace("channel_axis: typing.SupportsInt)", "channel_axis: typing.SupportsInt = ...)"))
    (folder / "tensorrt" / "plugin").mkdir(parents=True)
    (folder / "tensorrt" / "__init__.pyi").write_text(f"from {BINDINGS} import *\n__version__: str\n")
    names = "import tensorrt.plugin as p; print([(n, getattr(v, '__module__', '')) for n, v in vars(p).items()])"
    found = re.findall(rf"\('(\w+)', '({BINDINGS}\.plugin[\w.]+)'\)", bindings.run("-c", names))
    lines = [f"from {module} import {name} as {name}\n" for name, module in found]
    (folder / "tensorrt" / "plugin" / "__init__.pyi").write_text("".join(lines))
    return folder


def faults(stubs: Path, *files: Path) -> list[tuple[str, int, str]]:
    """File, line and message of each fault in the use of TensorRT."""
    (stubs / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {stubs}\nfollow_imports = skip\ncheck_untyped_defs = true\n"
        f"[mypy-tensorrt.*,{BINDINGS}.*]\nfollow_imports = silent\nignore_errors = true\n"
        "follow_untyped_imports = true\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(stubs / "mypy.ini"), *map(str, files)]
    done = subprocess.run(command, cwd=stubs, capture_output=True, text=True, timeout=50, check=False)
    lines = re.findall(r"^(.+?):(\d+): error: (.+?)  \[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert lines or done.returncode == 0, done.stdout + done.stderr
    return [(Path(file).name, int(line), text) for file, line, text, code in lines if code in CODES]


@pytest.mark.slow
def test_the_project_uses_what_is_there_and_each_fault_would_be_found(stubs: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    head = "import tensorrt as trt, tensorrt.plugin as trtp\n"
    parameters = "engine: trt.ICudaEngine, config: trt.IBuilderConfig, tensor: trtp.TensorDesc"
    wrong.write_text(f"{head}def f({parameters}) -> None:\n" + "".join(f"    {line}\n" for line in WRONG))
    found = faults(stubs, wrong, *(ROOT / user for user in USERS))
    assert [line for file, line, _ in found if file == wrong.name] == list(range(3, 3 + len(WRONG)))
    for message, text in zip(WRONG.values(), (text for file, _, text in found if file == wrong.name), strict=True):
        assert re.search(message, text)
    assert [fault for fault in found if fault[0] != wrong.name] == []


def test_every_user_of_tensorrt_is_checked() -> None:
    folders = (ROOT / name for name in ("src", "kernels", "export", "clients", "demo", "benchmarks"))
    files = [file for folder in folders for file in folder.rglob("*.py")]
    users = {str(file.relative_to(ROOT)) for file in files if re.search(r"^import tensorrt", file.read_text(), re.M)}
    assert users == set(USERS[:3])
