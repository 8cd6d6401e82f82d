"""Blipstream's language model without a server: python -m benchmarks.compare.programs.engine CHECKPOINT THREADS BUNDLE

The counterpart of CTranslate2's program, in the project's own environment. The graph takes the embeddings of a prompt's
first tokens in the place of an image's soft tokens, and the ids of the last ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from benchmarks.compare.programs.protocol import Job, Output, serve
from blipstream.decoding.request import Prompt
from blipstream.planning.engines import Bundle

TABLE = "language_model.model.decoder.embed_tokens.weight"


def embeddings(checkpoint: Path) -> npt.NDArray[np.float32]:
    """The language model's token embeddings (V, D)."""
    index: dict[str, Any] = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    with safe_open(checkpoint / index["weight_map"][TABLE], "np") as shard:
        table: npt.NDArray[np.float32] = shard.get_tensor(TABLE).astype(np.float32)
    return table


class Engine:
    """A bundle's language model."""

    def __init__(self, checkpoint: Path, bundle: Path, threads: int) -> None:
        self._bundle = Bundle(bundle, threads)
        self._table = embeddings(checkpoint)

    def answer(self, job: Job) -> Output:
        """Continue all prompts of a job as one batch."""
        requests = job["requests"]
        soft = self._bundle.manifest.qformer.num_query_tokens
        prompts = [Prompt(self._table[ids[:soft]], tuple(ids[soft:])) for ids in (r["ids"] for r in requests)]
        return self._bundle.continued(prompts, requests[0]["tokens"])


def main(checkpoint: str, threads: str, bundle: str) -> None:
    """Serve a bundle's language model."""
    serve(lambda: Engine(Path(checkpoint), Path(bundle), int(threads)).answer, ("blipstream", "onnxruntime"))


if __name__ == "__main__":
    main(*sys.argv[1:])
