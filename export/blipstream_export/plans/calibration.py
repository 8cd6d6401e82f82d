"""All samples as the graphs of a bundle read them while it serves, batch by batch: what int8 and fp8 are calibrated on.

A decoder behind an encoder serves in steps, each of which reads what the encoder made of the prompts and what the
steps before it have left in the cache. Both are computed here, by the graphs themselves in their standard form.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from blipstream.contract import DECODER_IO, ENCODER_IO
from blipstream.engines import Engine, TensorInfo, create_engine
from blipstream_export.lowering.tensorrt_reference import write_standard_form
from blipstream_export.plans.samples import Feed, GraphSamples, step_inputs


@dataclass(frozen=True)
class _Encoded:
    """What an encoder made of a batch of prompts."""

    lengths: npt.NDArray[np.int32]
    """(B,)"""
    outputs: Mapping[str, npt.NDArray[Any]]
    """(B, H, S, D) each."""


class Calibration:
    """Inputs of one graph after the other; an encoder's are asked for before those of its decoder.

    Args:
        samples: what is served.
    """

    def __init__(self, samples: GraphSamples) -> None:
        self._samples = samples
        self._encoded: list[_Encoded] = []

    def feeds(self, stage: str, graph: Path) -> Iterator[Feed]:
        """Inputs of a graph of a stage, in batches that are made as they are asked for."""
        names = {value.name for value in ir.load(graph).graph.inputs}
        if ENCODER_IO.lengths in names:
            self._encoded = list(self._encode(stage, graph))
        elif DECODER_IO.cross_seqlens_k in names:
            return self._steps(graph)
        return self._samples.feeds(stage, graph)

    def _encode(self, stage: str, graph: Path) -> Iterator[_Encoded]:
        with _running(graph) as engine:
            for feed in self._samples.feeds(stage, graph):
                yield _Encoded(feed[ENCODER_IO.lengths], engine.run(dict(feed)))

    def _steps(self, graph: Path) -> Iterator[Feed]:
        """Every step of every batch; a row that is done before the others repeats its last token."""
        sizes = self._samples.sizes
        assert sizes.encoder is not None
        past, present = (names(sizes.num_layers) for names in (DECODER_IO.cache_inputs, DECODER_IO.cache_outputs))
        with _running(graph) as engine:
            for texts, encoded in zip(self._samples.text_batches(), self._encoded, strict=True):
                longest = min(max(len(text.token_ids) for text in texts), sizes.max_tokens)
                rows = [(sizes.encoder.decoder_start_token_id, *text.token_ids) for text in texts]
                fixed = {DECODER_IO.cross_seqlens_k: encoded.lengths - 1} | self._cross(engine, encoded)
                caches = {
                    info.name: np.zeros((len(rows), *_fixed(info)), info.dtype)
                    for info in engine.inputs
                    if info.name in past
                }
                for step in range(longest):
                    feed = fixed | caches | step_inputs([row[min(step, len(row) - 1)] for row in rows], step)
                    yield feed
                    outputs = engine.run(dict(feed))
                    caches = {name: outputs[new] for name, new in zip(past, present, strict=True)}

    def _cross(self, engine: Engine, encoded: _Encoded) -> dict[str, npt.NDArray[Any]]:
        """What the encoder made, in a cache of the graph's length."""
        layers = self._samples.sizes.num_layers
        names = DECODER_IO.cross_inputs(layers)
        capacity = next(_fixed(info)[1] for info in engine.inputs if info.name == names[0])
        caches = {}
        for name, output in zip(names, ENCODER_IO.outputs(layers), strict=True):
            values = encoded.outputs[output]
            caches[name] = np.pad(values, ((0, 0), (0, 0), (0, capacity - values.shape[2]), (0, 0)))
        return caches


def _fixed(info: TensorInfo) -> tuple[int, ...]:
    """Sizes of a cache (B, H, T, D) but the first, which are fixed in the graph."""
    return tuple(size for size in info.shape[1:] if isinstance(size, int))


@contextmanager
def _running(graph: Path) -> Iterator[Engine]:
    """The standard form of a graph on ONNX Runtime."""
    with tempfile.TemporaryDirectory(prefix="standard.", dir=graph.parent) as folder:
        standard = graph.with_name(f"{Path(folder).name}.onnx")  # beside the graph, where its weights are
        try:
            engine = create_engine("onnxruntime", write_standard_form(graph, standard))
        finally:
            standard.unlink(missing_ok=True)
    with engine:
        yield engine
