"""``vision_encoder`` and ``qformer``: one graph each, in an inference engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blipstream.contract import GRAPH_FILE, QFORMER_SPEC, VISION_ENCODER_SPEC, ModelSpec
from blipstream.errors import BlipstreamError, InvalidRequestError
from blipstream.triton.calls import triton_error
from blipstream.triton.model import ModelFolder

Array = npt.NDArray[Any]


class GraphModel:
    """A Triton model that runs one graph with one input and one output on the batches that Triton gathers.

    A request whose numbers are not finite is answered with an error of its own and left out of the batch.
    """

    spec: ClassVar[ModelSpec]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the graph."""
        self._engine = ModelFolder(args).load_engine(GRAPH_FILE)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run the requests as one batch; one response each, in their order."""
        import triton_python_backend_utils as pb_utils

        name = self.spec.inputs[0].name
        arrays = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
        output = self.spec.outputs[0].name
        responses = []
        for result in run_batch(lambda batch: self._engine.run({name: batch})[output], arrays, name):
            if isinstance(result, BlipstreamError):
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=triton_error(result)))
            else:
                responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(output, result)]))
        return responses

    def finalize(self) -> None:
        """Release the graph."""
        self._engine.close()


def run_batch(run: Any, arrays: Sequence[Array], name: str) -> list[Array | BlipstreamError]:
    """Run several requests' arrays (b_i, ...) as one batch; return the rows of each, or its error.

    Args:
        run: maps a batch (B, ...) to its result (B, ...).
        arrays: one a request.
        name: of the tensor, for errors.
    """
    results: list[Array | BlipstreamError] = [_fault(array, name) or array for array in arrays]
    sound = [result for result in results if not isinstance(result, BlipstreamError)]
    if not sound:
        return results
    try:
        output = run(sound[0] if len(sound) == 1 else np.concatenate(sound))
    except BlipstreamError as error:
        return [result if isinstance(result, BlipstreamError) else error for result in results]
    first = 0
    for index, result in enumerate(results):
        if not isinstance(result, BlipstreamError):
            results[index] = output[first : first + len(result)]
            first += len(result)
    return results


def _fault(array: Array, name: str) -> InvalidRequestError | None:
    if np.isfinite(array).all():
        return None
    return InvalidRequestError(f"{name} must hold finite numbers, but some are NaN or infinite")


class VisionEncoderModel(GraphModel):
    """``pixel_values`` (B, 3, S, S) -> ``image_embeds`` (B, N, D)."""

    spec = VISION_ENCODER_SPEC


class QFormerModel(GraphModel):
    """``image_embeds`` (B, N, D) -> ``soft_tokens`` (B, Q, D_text)."""

    spec = QFORMER_SPEC
