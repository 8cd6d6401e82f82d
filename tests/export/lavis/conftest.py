"""Parts that the tests share; none of them may change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.lavis_parts import SavedParts, VitName, save_parts


@pytest.fixture(scope="session", params=["eva", "clip"])
def vit(request: pytest.FixtureRequest) -> VitName:
    name: VitName = request.param
    return name


@pytest.fixture(scope="session")
def parts(vit: VitName, tmp_path_factory: pytest.TempPathFactory) -> SavedParts:
    return save_parts(tmp_path_factory.mktemp("parts") / vit, vit)


@pytest.fixture
def own_parts(vit: VitName, tmp_path: Path) -> SavedParts:
    """Parts that a test may change."""
    return save_parts(tmp_path / "parts", vit)
