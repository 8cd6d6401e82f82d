"""TensorRT's bindings import where neither TensorRT nor a GPU is, and nothing pretends to work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tensorrt import standins
from tests.tensorrt.standins import Bindings, StandinError


def run(bindings: Bindings, source: str) -> str:
    return bindings.run("-c", f"import tensorrt as trt\n{source}").strip()


def test_the_bindings_import(bindings: Bindings) -> None:
    assert run(bindings, "print(trt.__version__)").startswith("11.4.")


def test_only_functions_of_tensorrt_are_stood_in_for(bindings: Bindings) -> None:
    assert {"createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "getPluginRegistry"} <= set(bindings.symbols)
    assert all("Infer" in name or "Onnx" in name or "Plugin" in name for name in bindings.symbols)


def test_a_builder_is_not_pretended(bindings: Bindings) -> None:
    with pytest.raises(StandinError, match="nullptr"):
        run(bindings, "trt.Builder(trt.Logger())")


def test_the_registry_is_the_lean_runtimes(bindings: Bindings, lean_bindings: Bindings) -> None:
    assert run(bindings, "print(trt.get_plugin_registry())") == "None"
    assert "IPluginRegistry" in run(lean_bindings, "print(trt.get_plugin_registry())")
    assert "getPluginRegistry" in set(bindings.symbols) - set(lean_bindings.symbols)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins, "BINDINGS", "no_such_package")
    monkeypatch.setenv("PATH", "/nowhere")
    assert standins.missing(lean=False) == "needs tensorrt-cu13-bindings and cc and readelf"


def test_a_compiler_that_fails_is_quoted(bindings: Bindings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(StandinError, match="no room left"):
        standins.make(tmp_path, lean=False)
