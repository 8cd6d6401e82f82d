"""The published models' true layer shapes behind a real server: greedy text is the checkpoint's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blipstream_export.build import build

from blipstream.triton.server import TritonServer
from tests.server import videos
from tests.server.faithful import Ask, Reference, ask_concurrently, assert_equal
from tests.support.checkpoints import PROMPTS, make_images
from tests.support.published import PUBLISHED

pytestmark = [
    pytest.mark.server,
    pytest.mark.large,
    pytest.mark.timeout(3600),
    # transformers' remark on its own default of 20 new tokens
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]
NEW_TOKENS = 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixed_requests_equal_the_checkpoint(name: str, tmp_path: Path) -> None:
    """32 at once: with prompts of unequal lengths, and without."""
    compare = _compare_videos if PUBLISHED[name].video else _compare_images
    try:
        checkpoint = PUBLISHED[name].save(tmp_path / "checkpoint")
        build(str(checkpoint), tmp_path / "bundle")
        texts = compare(checkpoint, tmp_path / "bundle")
    finally:
        shutil.rmtree(tmp_path)  # gigabytes, of which pytest would keep three
    assert len(texts) == 32
    assert len(set(texts)) > 20, "the texts hardly depend on what was asked"


def _compare_images(checkpoint: Path, bundle: Path) -> list[tuple[int, ...]]:
    asks = [Ask(image, PROMPTS[i % len(PROMPTS)]) for i, image in enumerate(make_images(32, seed=1))]
    with TritonServer(bundle) as server:
        answers = ask_concurrently(server.grpc_url, asks, max_tokens=NEW_TOKENS)
    assert_equal(Reference(checkpoint), asks, answers, max_new_tokens=NEW_TOKENS)
    return [tuple(token for chunk in chunks for token in chunk.token_ids) for chunks in answers]


def _compare_videos(checkpoint: Path, bundle: Path) -> list[tuple[int, ...]]:
    asks = videos.mixed_asks(steps=(0, 1, 2, 3, 4, 6, 7, 8))
    with TritonServer(bundle) as server:
        answers = videos.ask_concurrently(server.grpc_url, asks, max_tokens=NEW_TOKENS)
    reference = videos.Reference(checkpoint)
    assert answers == [reference.generate(video, text, max_new_tokens=NEW_TOKENS) for video, text in asks]
    return [tuple(answer) for answer in answers]
