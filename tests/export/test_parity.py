"""The parity report must fail a bundle that does not compute what the checkpoint computes."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from blipstream_export.build import BuildResult
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.parity import THRESHOLDS, ParityReport, StageParity, TextParity, compare, measure
from blipstream_export.reference import Reference, compute_reference
from onnx import numpy_helper

from blipstream.errors import ParityError

GOOD_STAGE = StageParity("qformer", "fp32", cosine=1.0, relative_error=1e-6, max_difference=1e-5, max_reference=2.0)
GOOD_TEXT = TextParity(image=0, prompt="a", expected=(5, 2), found=(5, 2), equal=True)


@pytest.fixture(scope="module")
def reference(random_checkpoint: Path) -> Reference:
    checkpoint = open_checkpoint(str(random_checkpoint))
    sizes = checkpoint.decoder_section(max_sequences=5, max_tokens=160)
    return compute_reference(load_model(checkpoint), checkpoint, sizes)


@pytest.fixture
def damaged(random_bundle: BuildResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_bundle.bundle, tmp_path / "bundle"))


def scale_weight(path: Path, name: str, factor: float) -> None:
    """Multiply one tensor of a graph."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, path)


def report_of(bundle: Path, result: BuildResult, reference: Reference) -> ParityReport:
    return measure(bundle, result.manifest, reference, threads=1)


def test_the_bundle_itself_passes(random_bundle: BuildResult, reference: Reference) -> None:
    report = report_of(random_bundle.bundle, random_bundle, reference)
    report.check()
    assert report.faults == []
    lengths = {len(text.found) for text in report.texts}
    assert len(lengths) > 1, "texts should end at different steps"


@pytest.mark.parametrize(
    ("graph", "weight", "stage"),
    [
        ("vision_encoder/1/model.onnx", "norm.weight", "vision_encoder"),
        ("qformer/1/model.onnx", "queries", "qformer"),
        ("blip2/1/decoder.onnx", "positions", "decoder prefill"),
    ],
)
def test_a_weight_off_by_a_percent_is_found(
    graph: str, weight: str, stage: str, damaged: Path, random_bundle: BuildResult, reference: Reference
) -> None:
    scale_weight(damaged / graph, weight, 1.01)
    report = report_of(damaged, random_bundle, reference)
    assert report.faults[0].startswith(f"{stage} ")
    passed = [row.stage for row in report.stages if not any(fault.startswith(row.stage) for fault in report.faults)]
    assert passed == [row.stage for row in report.stages if row.stage.split()[0] != stage.split()[0]]
    with pytest.raises(ParityError, match=f"the exported graphs do not reproduce the checkpoint: {stage} "):
        report.check()


def test_wrong_preprocessing_is_found(random_bundle: BuildResult, reference: Reference) -> None:
    image = random_bundle.manifest.image.model_copy(update={"resample": "bilinear"})
    manifest = random_bundle.manifest.model_copy(update={"image": image})
    report = measure(random_bundle.bundle, manifest, reference, threads=1)
    assert report.faults[0].startswith("preprocess ")


def test_a_wrong_end_token_is_found(random_bundle: BuildResult, reference: Reference) -> None:
    early = reference.texts[0].token_ids[3]
    generation = random_bundle.manifest.generation.model_copy(update={"eos_token_ids": (early,)})
    manifest = random_bundle.manifest.model_copy(update={"generation": generation})
    (fault,) = measure(random_bundle.bundle, manifest, reference, threads=1).faults
    assert " of 12 greedy texts differ (image " in fault


def make_report(*stages: StageParity, agreement: float = 1.0, text: TextParity = GOOD_TEXT) -> ParityReport:
    thresholds = {stage.precision: THRESHOLDS[stage.precision] for stage in stages}
    return ParityReport(thresholds, False, (GOOD_STAGE, *stages), agreement, (GOOD_TEXT, text))


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        (replace(GOOD_STAGE, cosine=0.9999), "qformer has cosine 0.9999000, and 0.99999 is asked for"),
        (replace(GOOD_STAGE, cosine=float("nan")), "qformer has cosine nan, and 0.99999 is asked for"),
        (replace(GOOD_STAGE, relative_error=3e-3), "qformer has relative error 0.003, and 0.001 is allowed"),
        (replace(GOOD_STAGE, relative_error=float("nan")), "qformer has relative error nan, and 0.001 is allowed"),
    ],
)
def test_thresholds_of_a_stage(stage: StageParity, fault: str) -> None:
    assert make_report(GOOD_STAGE).faults == []
    assert make_report(GOOD_STAGE, stage).faults == [fault]


def test_each_stage_has_the_thresholds_of_its_precision() -> None:
    rough = replace(GOOD_STAGE, stage="decoder step", precision="int8", cosine=0.97, relative_error=0.05)
    assert make_report(GOOD_STAGE, rough).faults == []
    faults = make_report(GOOD_STAGE, replace(rough, precision="bf16")).faults
    assert faults == ["decoder step has cosine 0.9700000, and 0.999 is asked for"]
    for stricter, looser in itertools.pairwise(THRESHOLDS):
        a, b = THRESHOLDS[stricter], THRESHOLDS[looser]
        assert a.min_cosine > b.min_cosine
        assert a.max_relative_error < b.max_relative_error
        assert a.min_agreement > b.min_agreement


def test_thresholds_of_the_texts() -> None:
    wrong = replace(GOOD_TEXT, found=(5, 3), equal=False)
    report = make_report(GOOD_STAGE, text=wrong)
    assert report.faults == ["1 of 2 greedy texts differ (image 0, prompt 'a': expected [5, 2], found [5, 3])"]


def test_of_a_quantized_bundle_the_tokens_must_agree_and_not_the_texts() -> None:
    wrong = replace(GOOD_TEXT, found=(5, 3), equal=False)
    int8 = replace(GOOD_STAGE, precision="int8")
    assert make_report(GOOD_STAGE, int8, agreement=0.9, text=wrong).faults == []
    report = make_report(GOOD_STAGE, int8, agreement=0.8, text=wrong)
    assert report.faults == ["80.0% of the greedy tokens agree, and 85% is asked for"]


def test_cosine_is_that_of_the_worst_row() -> None:
    expected = np.eye(3, dtype=np.float32)[None]  # (1, 3, 3)
    found = expected.copy()
    found[0, 1] = [0, 3, 4]
    stage = compare("any", "int8", found, expected)
    assert stage == StageParity("any", "int8", 0.6, relative_error=2.6, max_difference=4.0, max_reference=1.0)
    zeros = compare("any", "fp32", expected * 0, expected * 0)
    assert (zeros.cosine, zeros.relative_error) == (1.0, 0.0)
    assert np.isnan(compare("any", "fp32", expected * np.nan, expected).cosine)
