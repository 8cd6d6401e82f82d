"""What a build says that it will need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blipstream_export import build as build_module
from blipstream_export import needs as needs_module
from blipstream_export.build import BuildOptions, build
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.needs import Needs, check_disk, estimate_needs, total_memory
from blipstream_export.observer import STAGES, BuildObserver
from blipstream_export.parity import THRESHOLDS
from blipstream_export.precision import parse_precision
from blipstream_export.units import GIB, format_bytes
from torch import nn

from blipstream.errors import BundleError
from tests.support.checkpoints import make_blip2
from tests.support.deferring import defer_parameters


def estimate(model: nn.Module, precision: str = "fp32", memory: int = 1 << 40) -> Needs:
    return estimate_needs(model, parse_precision(precision), memory)


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    """Of a size that its weights matter beside what is fixed."""
    text = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "ffn_dim": 4096}
    model = make_blip2("opt", text=text)
    defer_parameters(model)
    return model


def test_every_precision_is_smaller_than_the_one_before(wide: nn.Module) -> None:
    sizes = [estimate(wide, precision).disk for precision in ("fp32", "fp16", "int8", "decoder=int4,int8")]
    weights = sum(parameter.numel() for parameter in wide.parameters())
    assert sizes[0] == pytest.approx(4 * weights, rel=0.05)
    assert [size / weights for size in sizes[1:]] == pytest.approx([2, 1, 0.56], rel=0.2)
    assert estimate(wide, "bf16") == estimate(wide, "fp16")


def test_weights_that_are_used_twice_count_once() -> None:
    for language, text in (("opt", {"vocab_size": 50_000}), ("t5", {"vocab_size": 50_000})):
        small, large = (make_blip2(language, text=fields) for fields in ({}, text))
        for model in (small, large):
            defer_parameters(model)
        table = large.get_input_embeddings().weight.numel() - small.get_input_embeddings().weight.numel()
        tables = 1 if language == "opt" else 2  # encoder's and decoder's are one; the head is another
        grown = estimate(large).disk - estimate(small).disk
        assert grown == pytest.approx(4 * tables * table, rel=0.05)


def test_the_bundle_is_not_larger_than_was_said(random_checkpoint: Path, tmp_path: Path) -> None:
    precision = "vision_encoder=bf16,qformer=int8,decoder=int4"
    model = load_model(open_checkpoint(str(random_checkpoint)), deferred=True)
    said = estimate(model, precision).disk - estimate(nn_nothing(model)).disk
    thresholds = {
        name: replace(limits, min_cosine=-1, max_relative_error=9, min_agreement=0)
        for name, limits in THRESHOLDS.items()
    }
    options = BuildOptions(precision=precision, thresholds=thresholds)
    result = build(str(random_checkpoint), tmp_path / "bundle", options)
    weights = sum(entry.bytes for name, entry in result.manifest.files.items() if ".onnx" in name)
    assert weights < said + 400_000  # of graphs


def nn_nothing(model: Any) -> nn.Module:
    nothing = nn.Module()
    nothing.config = model.config
    return nothing


def test_a_checkpoint_beyond_half_of_the_memory_is_streamed(wide: nn.Module) -> None:
    total = estimate(wide).weights
    assert not estimate(wide, memory=2 * total).streamed
    assert estimate(wide, memory=2 * total - 2).streamed
    assert estimate(wide, "int8", memory=2 * total - 2).memory < estimate(wide, "int8", memory=2 * total).memory
    assert GIB < estimate(wide, "int8", memory=total).memory < 1.5 * GIB


def test_a_full_disk_is_found_before_anything_is_computed(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    monkeypatch.setattr(build_module, "compute_reference", lambda *_: pytest.fail("the checkpoint was run"))
    with pytest.raises(
        BundleError, match=r"the bundle needs about 8\.\d MiB of disk, and .* has 3\.0 MiB left"
    ) as error:
        build(str(random_checkpoint), tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    check_disk(Needs(disk=1, memory=1, weights=1, streamed=False), tmp_path)


def test_memory_is_that_of_the_machine_or_of_its_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = total_memory()
    assert GIB < machine < 1 << 50
    for text, expected in (("1073741824\n", GIB), ("max\n", None)):
        monkeypatch.setattr(Path, "read_text", lambda *_args, text=text, **_kwargs: text)
        found = total_memory()
        assert found == expected if expected else found >= machine


def test_an_observer_is_told_of_needs_stages_and_progress(random_checkpoint: Path, tmp_path: Path) -> None:
    class Observer(BuildObserver):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def needs(self, needs: Needs) -> None:
            self.seen.append(needs)

        def stage(self, name: str) -> None:
            self.seen.append(name)

        def progress(self, done: int, total: int) -> None:
            assert 0 <= done < total
            self.seen.append((self.seen[-1] if isinstance(self.seen[-1], str) else self.seen[-1][0], done))

    observer = Observer()
    build(str(random_checkpoint), tmp_path / "bundle", observer=observer)
    assert tuple(name for name in observer.seen if isinstance(name, str)) == STAGES
    assert isinstance(observer.seen[1], Needs)
    assert [entry for entry in observer.seen if isinstance(entry, tuple)] == [("reference", i) for i in range(12)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (1 << 50, "1048576.0 GiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
