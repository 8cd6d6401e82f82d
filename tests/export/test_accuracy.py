"""Test sets and calibration images: read, judged, reported, and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from blipstream_demo import samples
from blipstream_export.accuracy import Accuracy, Question, measure_accuracy, read_images, read_test_set
from blipstream_export.build import BuildOptions, build
from blipstream_export.inprocess import InProcess

from blipstream.errors import BlipstreamError, BundleError
from tests.server.faithful import Ask, Reference
from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.checkpoints import PROMPTS, make_images
from tests.support.instructblip import save_instructblip, save_instructblipvideo

DEMO = Path(samples.__file__).parents[1]
QUESTION = {"image": "a.png", "prompt": "what?", "answers": ["A cat"]}


def write(folder: Path, *lines: Any) -> Path:
    make_images(1)[0].save(folder / "a.png")
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("answer", "right"), [("a cat", True), (" A  CAT.", True), ("cat", False), ("a cat..", False), ("", False)]
)
def test_what_counts_as_right(answer: str, right: bool) -> None:
    assert Question.model_validate(QUESTION).is_right(answer) is right


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "holds no question"),
        (["", "  "], "holds no question"),
        (["{"], "line 1 of the test set .* is not valid JSON: Expecting property name .* at column 2"),
        ([["a.png"]], r"is no question: expected a JSON object with image and answers, but it is \[\"a.png\"\]"),
        (
            [QUESTION, {**QUESTION, "answers": []}],
            r"line 2 .* 'answers' must be a list of texts, one at least, but .* \[\]",
        ),
        ([{**QUESTION, "answers": "cat"}], "field 'answers' must be a list of texts, one at least, but it is \"cat\""),
        ([{**QUESTION, "answers": ["cat", 3]}], r"must be a list of texts, one at least, but it is \[\"cat\", 3\]"),
        ([{**QUESTION, "image": 3}], "the field 'image' must be the path of an image, but it is 3"),
        ([{**QUESTION, "prompt": None}], "the field 'prompt' must be a text, but it is null"),
        ([QUESTION, "", {"image": "a.png"}], "line 3 of the test set .* 'answers' must be .*, but it is not there"),
        (
            [{**QUESTION, "answer": "x"}],
            "it has the field 'answer', and the fields of a question are image, prompt",
        ),
        (
            [QUESTION, {**QUESTION, "image": "b.png"}],
            "line 2 of the test set .* names an image that is not there: .*b.png",
        ),
    ],
)
def test_faults_of_a_test_set(lines: list[Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=fault):
        read_test_set(write(tmp_path, *lines))


def test_line_separators_inside_a_text(tmp_path: Path) -> None:
    question = {**QUESTION, "prompt": "one\u2028two\x85three"}
    path = write(tmp_path, "\ufeff" + json.dumps(question, ensure_ascii=False), json.dumps(QUESTION) + "\r")
    assert [read.prompt for read in read_test_set(path)] == [question["prompt"], "what?"]


def test_faults_come_before_any_work(random_checkpoint: Path, tmp_path: Path) -> None:
    """Each is one sentence, and no bundle is left."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"no image")
    video = save_instructblipvideo(tmp_path / "video")
    questions = write(tmp_path, QUESTION)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (random_checkpoint, {"test_set": tmp_path / "none.jsonl"}, "the test set .* cannot be read"),
        (video, {"test_set": questions}, "video reads several frames a request"),
        (
            random_checkpoint,
            {"calibration": tmp_path, "precision": "fp16"},
            "calibration images are read for int8, fp8 and",
        ),
        (random_checkpoint, {"calibration": tmp_path / "no", "precision": "int8"}, "there is no folder of images"),
        (random_checkpoint, {"calibration": tmp_path / "empty", "precision": "int8"}, "holds no image file"),
        (
            random_checkpoint,
            {"calibration": tmp_path / "damaged", "precision": "int8"},
            r"damaged/a.png cannot be read",
        ),
    ]
    for checkpoint, options, fault in cases:
        with pytest.raises(BlipstreamError, match=fault) as error:
            build(str(checkpoint), tmp_path / "bundle", BuildOptions(**options))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "bundle").exists()


def test_a_damaged_image_is_named(random_bundle: Any, tmp_path: Path) -> None:
    path = write(tmp_path, QUESTION)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BundleError, match=r"the image .*a\.png cannot be read: "):
        measure_accuracy(random_bundle.bundle, read_test_set(path))


def test_texts_in_process_are_the_checkpoints() -> None:
    """With instructions of unequal lengths, and images that come back."""
    checkpoint = checkpoint_of(save_instructblip, "t5", seed=3)
    bundle = bundle_of(checkpoint, BuildOptions(max_sequences=5))
    images = make_images(3, seed=2)
    asks = [Ask(images[i % 3], PROMPTS[i % len(PROMPTS)]) for i in range(20)]
    with InProcess(bundle, threads=1) as model:
        found = model.generate([ask.image for ask in asks], [ask.prompt for ask in asks], max_tokens=12)
    reference = Reference(checkpoint)
    assert found == [reference.generate(ask, max_new_tokens=12)[1].strip() for ask in asks]


@pytest.mark.slow
def test_int8_of_the_demo_checkpoint_is_right_as_often(tmp_path: Path) -> None:
    """On 100 test scenes, after calibration with other images of the demo; and all of it is in the report."""
    questions = samples.write_test_set(tmp_path / "test", 100)
    options = BuildOptions(precision="int8", calibration=DEMO / "images", test_set=questions)
    result = build(str(DEMO / "checkpoint"), tmp_path / "bundle", options)
    report = json.loads((tmp_path / "bundle" / "parity.json").read_text())
    rows = {row["kind"]: (row["right"], row["asked"]) for row in report["accuracy"]}
    assert rows == {row.kind: (row.right, row.asked) for row in result.parity.accuracy}
    forms = {row["weight"]: row["form"] for row in report["layers"]}
    assert forms.pop("language_model.model.decoder.embed_tokens.weight") == "int8, two digits"  # the head's
    assert len(forms) > 50
    assert all(row["rounding_error"] < 0.02 for row in report["layers"] if row["form"] == "int8")
    _assert_loses_little("checkpoint", result.parity.accuracy, questions)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["checkpoint-t5"])
def test_int8_of_the_other_demo_checkpoints_is_right_as_often(checkpoint: str, tmp_path: Path) -> None:
    questions = samples.write_test_set(tmp_path / "test", 50)
    result = build(str(DEMO / checkpoint), tmp_path / "bundle", BuildOptions(precision="int8", test_set=questions))
    _assert_loses_little(checkpoint, result.parity.accuracy, questions)


def _assert_loses_little(checkpoint: str, found: Sequence[Accuracy], questions: Path) -> None:
    """At most half a point of captions, and of answers, against fp32; or one of them where that is more."""
    exact = measure_accuracy(bundle_of(DEMO / checkpoint), read_test_set(questions))
    for kinds in ({"caption"}, {row.kind for row in exact} - {"caption"}):
        asked, before = (sum(getattr(row, name) for row in exact if row.kind in kinds) for name in ("asked", "right"))
        after = sum(row.right for row in found if row.kind in kinds)
        assert before > 0.9 * asked
        assert after >= before - max(1, 0.005 * asked)


def test_images_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for name, image in zip(("b.png", "a.jpg"), make_images(2), strict=True):
        image.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    sizes = [image.size for image in read_images(tmp_path)]
    assert sizes == [(64, 48), (64, 48)]
