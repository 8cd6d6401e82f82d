"""The published models' true layer shapes behind a real server: greedy text is the checkpoint's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blipstream_client import TextChunk
from blipstream_export.build import build

from blipstream.triton.server import TritonServer
from tests.checkpoints import PROMPTS, make_images
from tests.published import PUBLISHED
from tests.server.faithful import Ask, Reference, ask_concurrently, assert_equal

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
    try:
        answers = _serve_and_compare(name, tmp_path)
    finally:
        shutil.rmtree(tmp_path)  # gigabytes, of which pytest would keep three
    texts = {tuple(token for chunk in chunks for token in chunk.token_ids) for chunks in answers}
    assert len(texts) > 20, "the texts hardly depend on what was asked"


def _serve_and_compare(name: str, folder: Path) -> list[list[TextChunk]]:
    checkpoint = PUBLISHED[name].save(folder / "checkpoint")
    build(str(checkpoint), folder / "bundle")
    asks = [Ask(image, PROMPTS[i % len(PROMPTS)]) for i, image in enumerate(make_images(32, seed=1))]
    with TritonServer(folder / "bundle") as server:
        answers = ask_concurrently(server.grpc_url, asks, max_tokens=NEW_TOKENS)
    assert_equal(Reference(checkpoint), asks, answers, max_new_tokens=NEW_TOKENS)
    return answers
