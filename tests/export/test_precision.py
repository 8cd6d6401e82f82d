"""Reading ``--precision``."""

from __future__ import annotations

import pytest
from blipstream_export.build import BuildOptions
from blipstream_export.precision import OF_ENGINE, PRECISIONS, StagePrecisions, parse_precision

from blipstream.errors import UnsupportedCheckpointError
from blipstream.manifest import EngineName


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp32", ("fp32", "fp32", "fp32")),
        ("int8", ("int8", "int8", "int8")),
        ("decoder=int4", ("fp32", "fp32", "int4")),
        ("int8,decoder=int4", ("int8", "int8", "int4")),
        ("decoder=int4, bf16", ("bf16", "bf16", "int4")),
        ("vision_encoder=int8,decoder=int4", ("int8", "fp32", "int4")),
        ("qformer=fp16,vision_encoder=int8,decoder=bf16", ("int8", "fp16", "bf16")),
    ],
)
def test_precision_of_each_stage(text: str, expected: tuple[str, str, str]) -> None:
    precisions = parse_precision(text)
    assert (precisions.vision_encoder, precisions.qformer, precisions.decoder) == expected
    assert list(precisions.as_dict().values()) == list(expected)
    assert precisions.of("decoder") == expected[2]
    assert BuildOptions(precision=text).precision == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "precision 'int3' is not built for onnxruntime: expected one of fp32, fp16, bf16, int8, int4"),
        ("", "precision '' is not built for onnxruntime: expected one of fp32"),
        ("INT8", "precision 'INT8' is not built"),
        (
            "int8,decoder=int5",
            "precision 'int5' in 'int8,decoder=int5' is not built for onnxruntime: expected one of fp32",
        ),
        ("int8,", "precision '' in 'int8,' is not built"),
        ("int8,fp16", "precision 'int8,fp16' names two precisions for all stages, int8 and fp16: expected one"),
        ("llm=int8", "precision 'llm=int8' names the stage 'llm': expected one of vision_encoder, qformer, decoder"),
        ("=int8", "names the stage '': expected one of vision_encoder, qformer, decoder"),
        ("decoder=int8,decoder=int4", "names the stage decoder twice: expected it once"),
        ("int4", "precision 'int4' asks for int4 in vision_encoder, and int4 is built for the decoder alone: expected"),
        ("decoder=int8,qformer=int4", "asks for int4 in qformer, and int4 is built for the decoder alone"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(text: str, message: str) -> None:
    for refuse in (parse_precision, lambda text: BuildOptions(precision=text)):
        with pytest.raises(UnsupportedCheckpointError) as error:
            refuse(text)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("engine", "text"), [("onnxruntime", "fp8"), ("onnxruntime-cuda", "int8"), ("tensorrt", "decoder=int4")]
)
def test_an_engine_that_is_not_built_so(engine: EngineName, text: str) -> None:
    expected = ", ".join(OF_ENGINE[engine])
    with pytest.raises(UnsupportedCheckpointError, match=f"is not built for {engine}: expected one of {expected}"):
        BuildOptions(engine=engine, precision=text)


def test_every_precision_can_be_asked_for() -> None:
    asked = {
        parse_precision(f"decoder={name}", engine).decoder for engine, names in OF_ENGINE.items() for name in names
    }
    assert asked == set(PRECISIONS)
    assert StagePrecisions() == parse_precision("fp32")
