"""The check of TensorRT's API finds what is wrong, and the project has nothing for it to find."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from tests.tensorrt import api, catalogue
from tests.tensorrt.catalogue import Catalogue
from tests.tensorrt.standins import ROOT, Bindings

FOLDERS = tuple(ROOT / name for name in ("src", "kernels", "export", "clients", "demo", "benchmarks"))
SAMPLES = Path(__file__).parent / "samples"

IMPORTS = "import tensorrt as trt\nimport tensorrt.plugin as trtp\nfrom tensorrt import Builder\n"

# One line with one fault each, and what is said of it.
WRONG = {
    "enum value": ("trt.BuilderFlag.FP16", "there is no tensorrt.BuilderFlag.FP16"),
    "class": ("trt.AttentionNormalisation", "there is no tensorrt.AttentionNormalisation"),
    "method of a parameter": ("def f(e: trt.ICudaEngine): e.get_binding_name(0)", "get_binding_name"),
    "method of an optional": ("def f(e: trt.ICudaEngine | None): e.get_binding_name(0)", "get_binding_name"),
    "method of a quoted type": ("def f(e: 'trt.ICudaEngine'): e.get_binding_name(0)", "get_binding_name"),
    "method of what is made": ("b = Builder(trt.Logger()); b.build_engine", "no tensorrt.Builder.build_engine"),
    "method of what is returned": (
        "Builder(trt.Logger()).create_network(0).add_fully_connected",
        "add_fully_connected",
    ),
    "attribute of a value": ("def f(e: trt.ICudaEngine): e.hardware_compatibility_level.level", "Level.level"),
    "keyword": ("Builder(trt.Logger()).create_network(flag=0)", r"takes \(flags.*\), not .*create_network\(flag=0\)"),
    "too many arguments": ("Builder(trt.Logger()).create_optimization_profile(1)", "takes "),
    "too few arguments": ("Builder()", r"takes \(logger\), not Builder\(\)"),
    "constructor": ("trt.IOptimizationProfile()", "has no constructor"),
    "assignment to what is not there": ("def f(c: trt.IBuilderConfig): c.max_workspace_size = 1", "max_workspace_size"),
    "assignment to what is given": ("def f(e: trt.ICudaEngine): e.num_io_tensors = 1", "cannot be assigned to"),
    "decorator": ("@trtp.implement('a::b')\ndef f(): ...", "there is no tensorrt.plugin.implement"),
    "keyword of a decorator": ("@trtp.register(name='a::b')\ndef f(): ...", "tensorrt.plugin.register takes"),
    "annotation": ("def f(t: trtp.TensorDescription): ...", "there is no tensorrt.plugin.TensorDescription"),
    "method of a description": ("def f(t: trtp.TensorDesc): t.alike()", "there is no tensorrt.plugin.TensorDesc.alike"),
    "imported name": ("from tensorrt import OnnxImporter", "there is no tensorrt.OnnxImporter"),
    "star": ("from tensorrt import *", "cannot be checked"),
    "attribute of an object": (
        "class C:\n  def __init__(self, e: trt.ICudaEngine): self.e = e\n  def f(self): self.e.num_bindings",
        "there is no tensorrt.ICudaEngine.num_bindings",
    ),
    "field": ("class C:\n  e: trt.ICudaEngine\n  def f(self): self.e.num_bindings", "num_bindings"),
    "function's return": ("def g() -> trt.Runtime: ...\ng().deserialize", "there is no tensorrt.Runtime.deserialize"),
    "method's return": (
        "class C:\n  def g(self) -> trt.Runtime: ...\n  def f(self): self.g().deserialize",
        "there is no tensorrt.Runtime.deserialize",
    ),
    "property of an object": (
        "class C:\n  @property\n  def g(self) -> trt.Runtime: ...\ndef f(c: C): c.g.deserialize",
        "there is no tensorrt.Runtime.deserialize",
    ),
    "import in a function": ("def f():\n  import tensorrt\n  tensorrt.BuilderFlags", "no tensorrt.BuilderFlags"),
}

# What works, or whose types are not certain; nothing may be said of it.
RIGHT = {
    "build": """
        def build(onnx: bytes, logger: trt.ILogger) -> trt.IHostMemory:
            builder = trt.Builder(logger)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, logger)
            if not parser.parse(onnx):
                raise ValueError([parser.get_error(i).desc() for i in range(parser.num_errors)])
            config = builder.create_builder_config()
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, pool_size=1 << 30)
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
            return builder.build_serialized_network(network, config)
        """,
    "run": """
        class Engine:
            def __init__(self, plan: bytes) -> None:
                self._engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
                self._context = self._engine.create_execution_context()
            def run(self, stream: int, *shape: int) -> bool:
                self._context.set_input_shape("x", shape)
                names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
                return self._context.execute_async_v3(stream_handle=stream)
        """,
    "logger of one's own": """
        class Log(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines = []
            def log(self, severity: trt.ILogger.Severity, message: str) -> None:
                self.lines.append((severity.name, message))
        """,
    "unpacked arguments": "def f(*args, **options): return trt.Builder(*args, **options)",
    "another's module": "import torch\ntorch.BuilderFlag.FP16",
    "shadowed": "def f(trt): return trt.BuilderFlag.FP16",
    "bound twice": "e = trt.Logger()\ne = object()\ne.whatever",
    "bound by a loop": "def f(e: list): \n  e = trt.Logger()\n  for e in []: e.whatever",
    "rebound from within": "e = trt.Logger()\ndef f():\n  global e\n  e = 1\ndef g(): e.real",
    "made of itself": "e = e.whatever",
    "relative import": "from .tensorrt import whatever",
}

USED = {
    "build": {
        "tensorrt.OnnxParser.get_error",
        "tensorrt.ParserError.desc",
        "tensorrt.IBuilderConfig.profiling_verbosity",
    },
    "run": {"tensorrt.IExecutionContext.execute_async_v3", "tensorrt.ICudaEngine.get_tensor_name"},
    "logger of one's own": {"tensorrt.ILogger.Severity.name"},
}


@pytest.fixture(scope="module")
def names(bindings: Bindings) -> Catalogue:
    return catalogue.load(bindings)


@pytest.mark.parametrize("case", WRONG)
def test_each_fault_is_found_alone(case: str, names: Catalogue) -> None:
    line, text = WRONG[case]
    report = api.check_source(IMPORTS + line, "sample.py", names)
    assert len(report.faults) == 1, str(report)
    assert report.faults[0].file == "sample.py"
    assert 4 <= report.faults[0].line <= 4 + line.count("\n")
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(report)


@pytest.mark.parametrize("case", RIGHT)
def test_what_works_is_left_alone(case: str, names: Catalogue) -> None:
    report = api.check_source(IMPORTS + dedent(RIGHT[case]), "sample.py", names)
    assert not report.faults, str(report)
    assert USED.get(case, set()) <= report.used


def test_faults_of_all_files_are_reported_together(names: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "one.py").write_text("import tensorrt as trt\n\ntrt.BuilderFlag.INT8\n")
    (tmp_path / "b" / "two.py").write_text("from tensorrt import Builder\nBuilder().x\n")
    (tmp_path / "b" / "other.py").write_text("# no tensorrt in here\nx.y(1)\n")
    report = api.check([tmp_path / "a", tmp_path / "b"], names)
    assert [(Path(fault.file).name, fault.line) for fault in report.faults] == [
        ("one.py", 3),
        ("two.py", 2),
        ("two.py", 2),
    ]


def test_the_project_uses_the_api_as_it_is(names: Catalogue) -> None:
    report = api.check([*FOLDERS, SAMPLES], names)
    assert not report.faults, f"\n{report}"
    assert {"tensorrt.plugin.register", "tensorrt.plugin.aot_impl", "tensorrt.DataType.itemsize"} <= report.used


def test_the_signatures_of_the_api_are_known(names: Catalogue) -> None:
    unknown = {name for name, entry in names.items() if entry.kind in ("method", "function") and not entry.signatures}
    # The first's docstring leaves a default out, the second's names a type of C++ for which there is no other name.
    assert unknown <= {"tensorrt.INetworkDefinition.add_scale_nd", "tensorrt.get_plugin_registry"}
