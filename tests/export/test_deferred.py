"""Deferred tensors: recorded, computed when asked for, and the same as real ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.deferred import Deferred, deferred, label_parameters, labels, materialize, stored_types
from blipstream_export.shards import deferred_tensors, read_tensor
from blipstream_export.weights import read_headers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blipstream.errors import CheckpointError
from tests.support.checkpoints import make_images, save_blip2_opt


class Source:
    """A tensor that counts how often it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.reads = 0

    def defer(self) -> Deferred:
        return deferred(tuple(self.tensor.shape), self.tensor.dtype, self.read)

    def read(self) -> Tensor:
        self.reads += 1
        return self.tensor.clone()


@pytest.fixture
def source() -> Source:
    return Source(torch.arange(12, dtype=torch.float16).reshape(3, 4))


OPERATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.float(),
    lambda x: x.T.contiguous(),
    lambda x: torch.cat([x, x.new_zeros(2, 4), x[1:] * 2]),
    lambda x: x.reshape(2, 6).unflatten(1, (3, 2)).flatten(0, 1),
    lambda x: torch.split(x, 2, dim=1)[1],
    lambda x: x.detach().clone().double().sum(0),
    lambda x: nn.functional.pad(x, (1, 2)),
]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_recorded_and_computed_later(operation: Callable[[Tensor], Tensor], source: Source) -> None:
    result, expected = operation(source.defer()), operation(source.tensor)
    assert isinstance(result, Deferred)
    assert source.reads == 0
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(materialize(result), expected)
    assert source.reads > 0
    assert stored_types(result) == {torch.float16}


def test_with_a_real_tensor_the_operation_is_run(source: Source) -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(source.defer().float(), requires_grad=False)
    x = torch.randn(2, 4)
    with torch.no_grad():
        output = layer(x)
    assert not isinstance(output, Deferred)
    assert source.reads == 1
    torch.testing.assert_close(output, nn.functional.linear(x, source.tensor.float(), layer.bias.detach()))


def test_writing_into_what_is_not_computed_is_refused(source: Source) -> None:
    with pytest.raises(RuntimeError, match="would write into a tensor that is not computed yet"):
        source.defer().mul_(2)


def test_a_module_of_deferred_parameters_can_be_copied_and_cast(source: Source) -> None:
    norm = nn.LayerNorm(4)
    norm.weight = nn.Parameter(source.defer()[1].float(), requires_grad=False)
    wide = copy.deepcopy(norm).double()
    assert norm.weight.dtype == torch.float32
    assert wide.weight.dtype == torch.float64
    assert isinstance(wide.weight, Deferred)
    assert torch.equal(materialize(wide.weight), source.tensor[1].double())
    assert torch.equal(materialize(norm.weight), source.tensor[1].float())


def test_labels_tell_which_parameters_a_tensor_is_made_of() -> None:
    sources = [Source(torch.ones(2, 2)), Source(torch.ones(2, 2).bfloat16())]
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("a", "b")})
    for layer, source in zip(model.values(), sources, strict=True):
        layer.weight = nn.Parameter(source.defer().float(), requires_grad=False)
    label_parameters(model)
    fused = torch.cat([layer.weight.detach() for layer in model.values()])
    assert labels(fused) == {"a.weight", "b.weight"}
    assert stored_types(fused) == {torch.float32, torch.bfloat16}
    assert labels(torch.ones(1)) == stored_types(torch.ones(1)) == set()


def test_a_deferred_checkpoint_is_the_checkpoint(random_checkpoint: Path) -> None:
    """The same parameters, ties and answers, with no weight in memory; transformers does the naming in both."""
    checkpoint = open_checkpoint(str(random_checkpoint))
    real, lazy = load_model(checkpoint), load_model(checkpoint, deferred=True)
    expected = dict(real.named_parameters())
    assert dict(lazy.named_parameters()).keys() == expected.keys()
    for name, parameter in lazy.named_parameters():
        assert isinstance(parameter, Deferred)
        assert parameter.label == name
        assert torch.equal(materialize(parameter), expected[name])
    language_model = lazy.language_model
    assert language_model.lm_head.weight is language_model.model.decoder.embed_tokens.weight
    assert lazy.generation_config.to_dict() == real.generation_config.to_dict()
    inputs = checkpoint.processor(images=make_images(1)[0], text="the dog", return_tensors="pt")
    first, second = (model.generate(**inputs, max_new_tokens=5, do_sample=False) for model in (real, lazy))
    assert torch.equal(first, second)


def test_shards_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    folder = save_blip2_opt(tmp_path / "sharded", max_shard_size="100KB")
    files = sorted(folder.glob("model-*.safetensors"))
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tensors = deferred_tensors(folder)
    assert len(files) > 2
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(materialize(tensor), expected[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_type_is_read_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 0, dtype=dtype), "b": torch.randn(5, 3).to(dtype), "c": torch.tensor(1).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    headers = read_headers(tmp_path)
    for name, tensor in tensors.items():
        found = read_tensor(headers[name])
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


def test_a_type_that_no_model_has_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the tensor a in .* is of type F8_E4M3: expected one of F64, F32, F16"):
        deferred_tensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2000)}, tmp_path / "model.safetensors")
    tensor = deferred_tensors(tmp_path)["a"]
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="was truncated while it was read"):
        np.asarray(materialize(tensor))
