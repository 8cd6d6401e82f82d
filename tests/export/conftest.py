"""Checkpoints and bundles that the export tests share; none of them may change one."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from blipstream_export.build import BuildOptions, BuildResult, build

from tests.export.language_models import VARIANTS, Exported, Exporter, make_model
from tests.support.checkpoints import save_blip2_opt

torch.set_num_threads(1)  # the models are tiny


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2_opt(tmp_path_factory.mktemp("checkpoints") / "random")


@pytest.fixture(scope="session")
def random_bundle(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    output = tmp_path_factory.mktemp("bundles") / "random"
    return build(str(random_checkpoint), output, BuildOptions(max_sequences=5))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """A variant of a language model, exported once for all tests."""

    @functools.cache
    def export(language: str, name: str) -> Exported:
        folder = tmp_path_factory.mktemp("language-model")
        return Exported.export(language, make_model(language, VARIANTS[language][name]), folder)

    return export


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))
