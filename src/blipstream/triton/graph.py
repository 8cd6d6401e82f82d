"""``vision_encoder`` and ``qformer``: one graph each, in an inference engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from blipstream.contract import GRAPH_FILE, IMAGE_EMBEDS, QFORMER, VISION_ENCODER
from blipstream.errors import BlipstreamError, InvalidRequestError
from blipstream.instructions import check_instruction, pad_instructions
from blipstream.triton.calls import triton_error
from blipstream.triton.model import ModelFolder

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]


class GraphModel:
    """A Triton model that runs one graph with one output on the batches that Triton gathers.

    A request with inputs that the graph cannot take is answered with an error of its own and left out of the batch.
    """

    name: ClassVar[str]

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the graph."""
        folder = ModelFolder(args)
        (spec,) = (model for model in folder.manifest.models if model.name == self.name)
        self._inputs = [tensor.name for tensor in spec.inputs]
        self._output = spec.outputs[0].name
        self._instruction = folder.manifest.qformer.instruction
        self._engine = folder.load_engine(GRAPH_FILE)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run the requests as one batch; one response each, in their order."""
        import triton_python_backend_utils as pb_utils

        inputs = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        responses = []
        for result in run_batch(self._run, inputs, self.check, self.gather):
            if isinstance(result, BlipstreamError):
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=triton_error(result)))
            else:
                responses.append(pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self._output, result)]))
        return responses

    def finalize(self) -> None:
        """Release the graph."""
        self._engine.close()

    def check(self, inputs: Inputs) -> None:
        """See that the graph can take a request's inputs.

        Raises:
            InvalidRequestError: it cannot.
        """
        for name, array in inputs.items():
            if not np.isfinite(array).all():
                raise InvalidRequestError(f"{name} must hold finite numbers, but some are NaN or infinite")

    def gather(self, requests: Sequence[Inputs]) -> Inputs:
        """The inputs of several requests as those of one batch."""
        return {name: _join([inputs[name] for inputs in requests]) for name in self._inputs}

    def _run(self, batch: Inputs) -> Array:
        return self._engine.run(batch)[self._output]


def run_batch(
    run: Callable[[Inputs], Array],
    requests: Sequence[Inputs],
    check: Callable[[Inputs], None],
    gather: Callable[[Sequence[Inputs]], Inputs],
) -> list[Array | BlipstreamError]:
    """Run several requests as one batch; return the rows of each, or its error.

    Args:
        run: maps a batch (B, ...) to its result (B, ...).
        requests: the inputs (b_i, ...) of each, by name.
        check: raises for a request that cannot run; it is left out of the batch.
        gather: makes the inputs of one batch out of those of the others.
    """
    faults = [_fault(inputs, check) for inputs in requests]
    sound = [inputs for inputs, fault in zip(requests, faults, strict=True) if fault is None]
    results: list[Array | BlipstreamError] = []
    try:
        output = run(gather(sound)) if sound else np.empty(0)
    except BlipstreamError as error:
        return [fault or error for fault in faults]
    first = 0
    for inputs, fault in zip(requests, faults, strict=True):
        count = 0 if fault else len(next(iter(inputs.values())))
        results.append(fault or output[first : first + count])
        first += count
    return results


def _fault(inputs: Inputs, check: Callable[[Inputs], None]) -> BlipstreamError | None:
    try:
        check(inputs)
    except BlipstreamError as error:
        return error
    return None


def _join(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class VisionEncoderModel(GraphModel):
    """``pixel_values`` (B, 3, S, S) -> ``image_embeds`` (B, N, D)."""

    name = VISION_ENCODER


class QFormerModel(GraphModel):
    """``image_embeds`` (B, N, D) -> ``soft_tokens`` (B, Q, D_text), with an instruction each where it reads them.

    The instructions of a batch are ragged: the model pads them, and masks the padding.
    """

    name = QFORMER

    def check(self, inputs: Inputs) -> None:
        """See that ``image_embeds`` are finite and that the instruction is one."""
        super().check({IMAGE_EMBEDS.name: inputs[IMAGE_EMBEDS.name]})
        if self._instruction is not None:
            check_instruction(inputs, self._instruction)

    def gather(self, requests: Sequence[Inputs]) -> Inputs:
        """The requests' ``image_embeds``, and their instructions padded to the longest."""
        if self._instruction is None:
            return super().gather(requests)
        embeds = _join([inputs[IMAGE_EMBEDS.name] for inputs in requests])
        return {IMAGE_EMBEDS.name: embeds, **pad_instructions(requests, self._instruction)}
