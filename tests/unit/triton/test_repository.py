"""The configuration of each Triton model says what the contract says."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from blipstream_export.bundle import copy_models, model_repository

from blipstream.contract import BLIP2, BLIP2_UNARY, IMAGE_FEATURES, TRITON_MODELS, ModelSpec, TensorSpec
from tests.unit.triton.fakes import make_manifest

text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

DATA_TYPES = {"BYTES": "STRING"}
BATCH_SIZES = {BLIP2: 1, BLIP2_UNARY: 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    manifest = make_manifest()
    copy_models(folder, {**manifest.dims(), "max_sequences": manifest.decoder.max_sequences})
    return folder


def read_config(bundle: Path, model: str) -> Any:
    text = (bundle / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def declared(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
    data_type = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return tensor.name, data_type, tuple(tensor.dims)


def expected(spec: TensorSpec) -> tuple[str, str, tuple[int, ...]]:
    return spec.name, DATA_TYPES.get(spec.dtype, spec.dtype), make_manifest().shape(spec)


@pytest.mark.parametrize("spec", TRITON_MODELS, ids=lambda spec: spec.name)
def test_tensors_are_those_of_the_contract(bundle: Path, spec: ModelSpec) -> None:
    config = read_config(bundle, spec.name)
    assert config.name == spec.name
    assert [declared(tensor) for tensor in config.input] == [expected(tensor) for tensor in spec.inputs]
    assert [declared(tensor) for tensor in config.output] == [expected(tensor) for tensor in spec.outputs]
    assert [tensor.optional for tensor in config.input] == [tensor.optional for tensor in spec.inputs]


@pytest.mark.parametrize("spec", TRITON_MODELS, ids=lambda spec: spec.name)
def test_batching_and_transaction_policy(bundle: Path, spec: ModelSpec) -> None:
    config = read_config(bundle, spec.name)
    assert config.max_batch_size == BATCH_SIZES.get(spec.name, 8)
    assert config.model_transaction_policy.decoupled == (spec.name == BLIP2)
    batches_dynamically = spec.name in ("preprocess", "vision_encoder", "qformer")
    assert config.HasField("dynamic_batching") == batches_dynamically


def test_the_ensemble_passes_each_tensor_on(bundle: Path) -> None:
    config = read_config(bundle, IMAGE_FEATURES)
    specs = {spec.name: spec for spec in TRITON_MODELS}
    for step in config.ensemble_scheduling.step:
        assert dict(step.input_map) == {tensor.name: tensor.name for tensor in specs[step.model_name].inputs}
        assert dict(step.output_map) == {tensor.name: tensor.name for tensor in specs[step.model_name].outputs}
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["preprocess", "vision_encoder", "qformer"]


@pytest.mark.parametrize("spec", TRITON_MODELS, ids=lambda spec: spec.name)
def test_model_files_re_export_a_class(spec: ModelSpec) -> None:
    path = model_repository() / spec.name / "1" / "model.py"
    if spec.name == IMAGE_FEATURES:
        assert not path.exists()
        return
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    (imported,) = imports
    assert imported.names[0].asname == "TritonPythonModel"
    module = __import__(str(imported.module), fromlist=[imported.names[0].name])
    model = getattr(module, imported.names[0].name)
    assert all(callable(getattr(model, method)) for method in ("initialize", "execute", "finalize"))
