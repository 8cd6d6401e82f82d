"""A whole build: what a bundle holds, that it is the same every time, and what the command line says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from blipstream_export.build import BuildOptions, BuildResult, build
from blipstream_export.observer import STAGES
from blipstream_export.terminal import show
from typer.testing import CliRunner

from blipstream.cli import app
from blipstream.contract import MODEL_NAMES
from blipstream.extras import install
from blipstream.manifest import BUNDLE_REVISION, MANIFEST_FILE, PARITY_FILE, Manifest
from tests.support.checkpoints import save_blip2

COMMAND = [sys.executable, "-c", "from blipstream.cli import app; app()", "build"]
GRAPHS = {"vision_encoder/1/model.onnx", "qformer/1/model.onnx", "blip2/1/decoder.onnx"}


def read_all(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def test_layout(random_bundle: BuildResult) -> None:
    bundle = random_bundle.bundle
    folders = {path.name for path in bundle.iterdir() if path.is_dir()}
    assert folders == set(MODEL_NAMES)  # nothing but Triton models: it is a model repository
    files = set(read_all(bundle))
    assert files >= GRAPHS | {"blip2/1/tokenizer.json", MANIFEST_FILE, PARITY_FILE}
    assert files >= {f"{name}/config.pbtxt" for name in MODEL_NAMES}
    assert not [name for name in files if "cache" in name or name.endswith(".pyc")]
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_manifest(random_bundle: BuildResult, random_checkpoint: Path) -> None:
    manifest = Manifest.load(random_bundle.bundle)
    assert manifest == random_bundle.manifest
    assert manifest.revision == BUNDLE_REVISION
    assert (manifest.kind, manifest.source, manifest.engine) == ("blip2-opt", random_checkpoint.name, "onnxruntime")
    assert manifest.precision == {"vision_encoder": "fp32", "qformer": "fp32", "decoder": "fp32"}
    assert dict(manifest.dims()) == {
        "image_size": 28,
        "num_image_tokens": 17,
        "vision_hidden_size": 36,
        "num_query_tokens": 6,
        "decoder_hidden_size": 48,
    }
    assert manifest.decoder.model_dump() == {
        "family": "opt",
        "num_layers": 2,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "hidden_size": 48,
        "vocab_size": 320,
        "max_sequences": 5,
        "max_tokens": 160,  # what the model reads is less than the default
        "encoder": None,
    }
    assert manifest.image.model_dump() == {
        "size": 28,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "resample": "bicubic",
        "rescale_factor": 1 / 255,
    }
    contents = read_all(random_bundle.bundle)
    assert manifest.files.keys() == contents.keys() - {MANIFEST_FILE, PARITY_FILE}
    for name, entry in manifest.files.items():
        assert entry.bytes == len(contents[name])
        assert entry.sha256 == hashlib.sha256(contents[name]).hexdigest()


def test_a_bundle_whose_language_model_has_an_encoder(tmp_path: Path) -> None:
    checkpoint = save_blip2(tmp_path / "checkpoint", "t5", text={"bos_token_id": None})
    result = build(str(checkpoint), tmp_path / "bundle", BuildOptions(max_sequences=2))
    manifest, files = Manifest.load(result.bundle), read_all(result.bundle)
    assert manifest.kind == "blip2-t5"
    graphs = [name for name in files if name.startswith("blip2/1/") and name.endswith(".onnx")]
    assert sorted(graphs) == ["blip2/1/decoder.onnx", "blip2/1/encoder.onnx"]
    assert set(graphs) <= manifest.files.keys()
    written = sum(len(content) for name, content in files.items() if name.startswith(tuple(graphs)))  # with weights
    assert [stage.bytes for stage in result.stages if stage.name == "decoder"] == [written]
    assert manifest.decoder.encoder is not None
    assert (manifest.decoder.encoder.max_tokens, manifest.decoder.max_tokens) == (256, 257)  # of a prompt, of a row
    assert manifest.generation.empty_prompt_ids == (1,)
    (note,) = result.notes
    assert note.startswith("the language model has no bos_token_id, without which generate cannot caption")
    assert result.parity.faults == []


def test_parity_report(random_bundle: BuildResult) -> None:
    report = json.loads((random_bundle.bundle / PARITY_FILE).read_text())
    assert [stage["stage"] for stage in report["stages"]] == [
        "preprocess",
        "vision_encoder",
        "qformer",
        "decoder prefill",
        "decoder step",
    ]
    assert all(stage["cosine"] >= report["thresholds"]["fp32"]["min_cosine"] for stage in report["stages"])
    assert {stage["precision"] for stage in report["stages"]} == {"fp32"}
    assert report["agreement"] == 1.0
    assert report["stages"][0]["max_difference"] == 0
    assert all(text["equal"] and text["found"] for text in report["texts"])
    assert {text["prompt"] == "" for text in report["texts"]} == {True, False}
    assert len({tuple(text["found"]) for text in report["texts"]}) > 6


@pytest.mark.slow
def test_building_twice_gives_the_same_bytes(
    random_bundle: BuildResult, random_checkpoint: Path, tmp_path: Path
) -> None:
    """In another process with another hash seed and another working folder, through the command line."""
    command = [*COMMAND, str(random_checkpoint), "-o", "other name", "--max-sequences", "5", "--precision", "fp32"]
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"vision_encoder +│ +\d+\.\d KiB │ +\d+\.\d ", done.stdout)
    assert re.search(r"decoder step +│ fp32 +│ 1\.0000000 ", done.stdout)
    assert "Greedy tokens: 12 of 12 sample texts equal the checkpoint's; token by token, 100.0% agree." in done.stdout
    assert "Bundle: other name" in done.stdout
    assert read_all(tmp_path / "other name") == read_all(random_bundle.bundle)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(number: signal.Signals, random_checkpoint: Path, tmp_path: Path) -> None:
    command = [*COMMAND, str(random_checkpoint), "-o", str(tmp_path / "bundle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not list(tmp_path.glob(".bundle.*.partial/vision_encoder")) and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(number)
            _, errors = process.communicate()
        finally:
            process.kill()
    assert process.returncode not in (0, 1) or "Aborted" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_stages_are_timed_and_named(random_bundle: BuildResult, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    assert tuple(stage.name for stage in random_bundle.stages) == STAGES
    graphs = {stage.name: stage.bytes for stage in random_bundle.stages if stage.bytes is not None}
    sizes = {name.partition("/")[0]: len((random_bundle.bundle / name).read_bytes()) for name in GRAPHS}
    assert graphs == {name.replace("blip2", "decoder"): size for name, size in sizes.items()}
    show(random_bundle, Console(width=200))
    assert "Note:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at-all/x", "-o", "out"], "blipstream build: there is no folder nowhere/at-all/x, and a hub id"),
        (
            ["nowhere/at-all/x", "-o", "/proc/bundle"],
            "blipstream build: /proc/bundle cannot be written: No such file or directory",
        ),
        (
            ["x", "-o", "out", "--precision", "int3"],
            "precision 'int3' is not built for onnxruntime: expected one of fp32",
        ),
    ],
)
def test_errors_are_one_line_on_standard_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["build", *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_output_is_looked_at_before_the_checkpoint(random_bundle: BuildResult) -> None:
    before = read_all(random_bundle.bundle)
    result = CliRunner().invoke(app, ["build", "no/checkpoint", "-o", str(random_bundle.bundle)])
    assert result.exit_code == 1
    assert "already holds a bundle: pass --force to replace it" in result.stderr
    assert read_all(random_bundle.bundle) == before


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; " + COMMAND[2]  # None: importing it raises ModuleNotFoundError
    command = [sys.executable, "-c", code, "build", "checkpoint", "-o", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"blipstream build: torch is not installed: {install('export')} brings it\n"


def test_the_command_line_starts_without_torch() -> None:
    heavy = {"torch", "transformers", "onnx", "onnxruntime"}
    code = f"import sys, blipstream.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
