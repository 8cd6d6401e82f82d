"""``blip2_unary``: one request, one response, for clients that know nothing else.

It forwards each request to ``blip2`` by BLS, without streaming. One instance serves many requests at once: each waits
on a thread of its own and is answered by its response sender.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from blipstream.contract import BLIP2
from blipstream.errors import EngineError
from blipstream.triton.calls import CALL_PARAMETER, CANCEL_PARAMETER, TritonCall, forwarded_error
from blipstream.triton.cancellation import CancellationWatch
from blipstream.triton.model import ModelFolder

_log = logging.getLogger(__name__)

_SPARE_THREADS = 8
"""Beyond what ``blip2`` takes at once, so that it is the one that refuses."""


class UnaryModel:
    """Owns the threads that wait for ``blip2``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start to serve."""
        folder = ModelFolder(args)
        at_once = folder.config.queue_size + folder.manifest.decoder.max_sequences + _SPARE_THREADS
        self._pool = ThreadPoolExecutor(at_once, "forwarded")
        self._watch = CancellationWatch[ForwardedCall](ForwardedCall.cancel)
        self._watch.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Forward the requests."""
        for request in requests:
            call = ForwardedCall(request)
            self._watch.add(call)
            self._pool.submit(self._forward, call)

    def finalize(self) -> None:
        """Stop the threads; by now Triton has seen every request answered."""
        self._watch.close()
        self._pool.shutdown()

    def _forward(self, call: ForwardedCall) -> None:
        try:
            call.forward()
        except Exception as error:
            _log.exception("request %s could not be forwarded", call.request_id)
            call.fail(EngineError(f"the request could not be forwarded to {BLIP2}: {error!r}"))
        finally:
            self._watch.discard(call)


class ForwardedCall(TritonCall):
    """A request on its way to ``blip2`` and back."""

    def __init__(self, request: Any) -> None:
        super().__init__(request)
        self.name = uuid.uuid4().hex
        self._output_names = list(request.requested_output_names())
        self._timeout_us = request.timeout()

    def forward(self) -> None:
        """Ask ``blip2``, wait, and pass its answer on."""
        import triton_python_backend_utils as pb_utils

        tensors = [tensor for tensor in self._request.inputs() if tensor.name() != "stream"]
        responses = list(self._ask(tensors, {**self.parameters, CALL_PARAMETER: self.name}))
        error = forwarded_error(responses[0].error()) if responses[0].has_error() else None
        self.respond(pb_utils.InferenceResponse(responses[0].output_tensors(), error), final=True)

    def cancel(self) -> None:
        """Have ``blip2`` end the request; its answer still comes."""
        import triton_python_backend_utils as pb_utils

        nothing = pb_utils.Tensor(
            "text_input", np.array([[b""]], np.object_)
        )  # Triton refuses a request without inputs
        list(self._ask([nothing], {CANCEL_PARAMETER: self.name}))

    def _ask(self, tensors: list[Any], parameters: Mapping[str, Any]) -> Any:
        import triton_python_backend_utils as pb_utils

        request = pb_utils.InferenceRequest(
            request_id=self.request_id,
            model_name=BLIP2,
            inputs=tensors,
            requested_output_names=self._output_names,
            timeout=self._timeout_us,
            parameters=dict(parameters),
        )
        return request.exec(decoupled=True)
