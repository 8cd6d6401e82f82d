"""The configuration of each Triton model says what the contract says."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from blipstream.contract import BLIP2, BLIP2_UNARY, IMAGE_FEATURES, MODEL_NAMES, ModelSpec, TensorSpec
from blipstream.manifest import Manifest
from blipstream.repository import model_repository, write_models
from tests.unit.triton.fakes import make_manifest

text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

DATA_TYPES = {"BYTES": "STRING"}
BATCH_SIZES = {BLIP2: 1, BLIP2_UNARY: 1}


@pytest.fixture(scope="module", params=[False, True], ids=["BLIP-2", "InstructBLIP"])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    return make_manifest(instructed=request.param)


@pytest.fixture(scope="module")
def bundle(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_models(folder, manifest)
    return folder


def read_config(bundle: Path, model: str) -> Any:
    text = (bundle / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def find_spec(manifest: Manifest, name: str) -> ModelSpec:
    (spec,) = (model for model in manifest.models if model.name == name)
    return spec


def declared(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
    data_type = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return tensor.name, data_type, tuple(tensor.dims)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_tensors_are_those_of_the_contract(bundle: Path, manifest: Manifest, name: str) -> None:
    def expected(tensor: TensorSpec) -> tuple[str, str, tuple[int, ...]]:
        return tensor.name, DATA_TYPES.get(tensor.dtype, tensor.dtype), manifest.shape(tensor)

    config, spec = read_config(bundle, name), find_spec(manifest, name)
    assert config.name == name
    assert [declared(tensor) for tensor in config.input] == [expected(tensor) for tensor in spec.inputs]
    assert [declared(tensor) for tensor in config.output] == [expected(tensor) for tensor in spec.outputs]
    assert [tensor.optional for tensor in config.input] == [tensor.optional for tensor in spec.inputs]
    batches = config.HasField("dynamic_batching")  # what does not batch has no batch to be ragged
    assert [tensor.allow_ragged_batch for tensor in config.input] == [
        batches and tensor.ragged for tensor in spec.inputs
    ]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_batching_and_transaction_policy(bundle: Path, name: str) -> None:
    config = read_config(bundle, name)
    assert config.max_batch_size == BATCH_SIZES.get(name, 8)
    assert config.model_transaction_policy.decoupled == (name == BLIP2)
    batches_dynamically = name in ("preprocess", "vision_encoder", "qformer")
    assert config.HasField("dynamic_batching") == batches_dynamically


def test_images_are_batched_as_the_processor_likes_it(bundle: Path, manifest: Manifest) -> None:
    """A tiny ViT in full batches, ViT-g two at a time; on a GPU, as many as were asked for."""
    config = read_config(bundle, "vision_encoder")
    assert list(config.dynamic_batching.preferred_batch_size) == [manifest.preferred_images] == [8]
    vision = manifest.vision.model_copy(update={"num_image_tokens": 257, "hidden_size": 1408})
    large = manifest.model_copy(update={"vision": vision})
    assert large.preferred_images == 2
    assert large.model_copy(update={"engine": "tensorrt"}).preferred_images == 8
    assert large.model_copy(update={"max_batch": 1}).preferred_images == 1


@pytest.mark.parametrize("template", ["Question: {} Answer:", "{}", '问 "{}"\\\n$max_batch é'])
def test_clients_learn_how_to_ask(template: str, manifest: Manifest, tmp_path: Path) -> None:
    generation = manifest.generation.model_copy(update={"question_template": template})
    write_models(tmp_path, manifest.model_copy(update={"generation": generation}))
    assert read_config(tmp_path, BLIP2).parameters["question_template"].string_value == template


def test_the_ensemble_passes_each_tensor_on(bundle: Path, manifest: Manifest) -> None:
    config = read_config(bundle, IMAGE_FEATURES)
    for step in config.ensemble_scheduling.step:
        spec = find_spec(manifest, step.model_name)
        assert dict(step.input_map) == {tensor.name: tensor.name for tensor in spec.inputs}
        assert dict(step.output_map) == {tensor.name: tensor.name for tensor in spec.outputs}
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["preprocess", "vision_encoder", "qformer"]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_model_files_re_export_a_class(name: str) -> None:
    path = model_repository() / name / "1" / "model.py"
    if name == IMAGE_FEATURES:
        assert not path.exists()
        return
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    (imported,) = imports
    assert imported.names[0].asname == "TritonPythonModel"
    module = __import__(str(imported.module), fromlist=[imported.names[0].name])
    model = getattr(module, imported.names[0].name)
    assert all(callable(getattr(model, method)) for method in ("initialize", "execute", "finalize"))
