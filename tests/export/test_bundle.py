"""Writing a bundle: all or nothing, and never over anything else."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from blipstream_export.bundle import list_files, new_bundle

from blipstream import repository
from blipstream.contract import MODEL_NAMES
from blipstream.errors import BundleError
from blipstream.manifest import MANIFEST_FILE
from blipstream.repository import copy_models, model_repository

VALUES = {
    "image_size": 28,
    "num_image_tokens": 17,
    "vision_hidden_size": 36,
    "num_query_tokens": 6,
    "decoder_hidden_size": 48,
    "max_sequences": 5,
    "max_batch": 3,
    "preferred_images": 2,
    "question_template": "{}",
}


def write_bundle(output: Path, text: str, *, replace: bool = False) -> None:
    with new_bundle(output, replace=replace) as folder:
        (folder / MANIFEST_FILE).write_text(text)


def test_a_bundle_appears_when_it_is_done(tmp_path: Path) -> None:
    output = tmp_path / "new" / "bundle"
    with new_bundle(output) as folder:
        assert folder.parent == output.parent
        assert not output.exists()
        (folder / MANIFEST_FILE).write_text("x")
    assert [path.name for path in output.parent.iterdir()] == ["bundle"]
    assert output.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [BundleError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with new_bundle(tmp_path / "bundle") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "code", "file", "fault"),
    [
        ("file/bundle", 0, None, "file/bundle cannot be written: "),
        ("bundle", errno.ENOSPC, None, "bundle cannot be written: No space left on device$"),
        ("bundle", errno.EACCES, "{}/x", "bundle cannot be written: Permission denied$"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence(
    output: str, code: int, file: str | None, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=fault) as caught, new_bundle(tmp_path / output) as folder:
        raise OSError(code, os.strerror(code), file and file.format(folder))
    assert ".partial" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_faults_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_bundle(tmp_path / ("x" * 255)):
        Path("/nowhere").read_text()


def test_a_failure_keeps_the_old_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "old")
    with pytest.raises(KeyboardInterrupt), new_bundle(tmp_path / "bundle", replace=True):
        raise KeyboardInterrupt
    assert (tmp_path / "bundle" / MANIFEST_FILE).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "left over").touch()
    with pytest.raises(BundleError, match="bundle already holds a bundle: pass --force to replace it"):
        write_bundle(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle" / MANIFEST_FILE).read_text() == "old"
    write_bundle(tmp_path / "bundle", "new", replace=True)
    assert (tmp_path / "bundle" / MANIFEST_FILE).read_text() == "new"
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", MANIFEST_FILE]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.jpg").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BundleError, match=r"folder exists and is not a bundle \(it holds no manifest.json\)"):
        write_bundle(tmp_path / "folder", "new", replace=True)
    with pytest.raises(BundleError, match="file exists and is not a folder"):
        write_bundle(tmp_path / "file", "new", replace=True)
    assert (tmp_path / "folder" / "photo.jpg").read_text() == (tmp_path / "file").read_text() == "precious"


def test_an_empty_folder_may_become_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle" / MANIFEST_FILE).read_text() == "new"


@pytest.mark.parametrize("instructed", [False, True])
def test_models_are_copied_and_filled_in(instructed: bool, tmp_path: Path) -> None:
    copy_models(tmp_path, VALUES, instructed=instructed)
    assert {path.name for path in tmp_path.iterdir()} == set(MODEL_NAMES)
    for name in MODEL_NAMES:
        assert [path.name for path in (tmp_path / name).glob("*.pbtxt")] == ["config.pbtxt"]
        config = (tmp_path / name / "config.pbtxt").read_text()
        assert "$" not in config
        assert f'name: "{name}"' in config
        assert ("qformer_input_ids" in config) == (instructed and name in ("qformer", "image_features"))
        assert (tmp_path / name / "1").is_dir()
    assert "dims: [ 3, 28, 28 ]" in (tmp_path / "preprocess" / "config.pbtxt").read_text()
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize("instructed", [False, True])
def test_models_for_tritons_tensorrt_backend(instructed: bool, tmp_path: Path) -> None:
    copy_models(tmp_path, {**VALUES, "profiles": '"0", "1"'}, instructed=instructed, backend="tensorrt")
    native = {"vision_encoder"} if instructed else {"vision_encoder", "qformer"}
    for name in MODEL_NAMES:
        config = (tmp_path / name / "config.pbtxt").read_text()
        assert ('backend: "tensorrt"' in config) == ('profile: [ "0", "1" ]' in config) == (name in native)
        assert "$" not in config


def test_a_placeholder_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"uses a placeholder that has no value \('image_size'\); there are"):
        copy_models(tmp_path, {name: value for name, value in VALUES.items() if name != "image_size"})


def test_a_model_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "model_repository", lambda: tmp_path)
    with pytest.raises(BundleError, match="the Triton model preprocess is missing: expected"):
        copy_models(tmp_path / "bundle", VALUES)


def test_the_models_are_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib" / "site-packages" / "blipstream"
    package.mkdir(parents=True)
    monkeypatch.setattr(repository, "__file__", str(package / "repository.py"))
    with pytest.raises(BundleError, match=r"the Triton models are missing: expected .*blipstream/model_repository"):
        model_repository()
    (package / "model_repository").mkdir()
    assert model_repository() == package / "model_repository"


def test_files_are_listed_with_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "model" / "1").mkdir(parents=True)
    (tmp_path / "model" / "1" / "graph").write_bytes(b"weights" * 300_000)
    (tmp_path / MANIFEST_FILE).write_text("not listed")
    (entry,) = list_files(tmp_path).items()
    assert entry[0] == "model/1/graph"
    assert entry[1].bytes == 2_100_000
    assert entry[1].sha256 == hashlib.sha256(b"weights" * 300_000).hexdigest()
