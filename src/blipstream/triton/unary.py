"""``blip2_unary``: one request, one response, for clients that know nothing else.

It forwards each request to ``blip2`` by BLS, without streaming. One instance serves many requests at once: each waits
on a thread of its own and is answered by its response sender.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from blipstream.contract import BLIP2, BLIP2_UNARY, IMAGE
from blipstream.errors import BlipstreamError, EngineError, InvalidRequestError, ServerBusyError
from blipstream.image_files import ImageLimits
from blipstream.triton.calls import Answer, TritonCall, forwarded_error
from blipstream.triton.cancellation import CancellationWatch
from blipstream.triton.model import ModelFolder
from blipstream.triton.parameters import CALL_PARAMETER, CANCEL_PARAMETER, check_parameters

_log = logging.getLogger(__name__)

_SPARE_THREADS = 8
"""Beyond what ``blip2`` takes at once, so that it is the one that refuses."""
_MAX_TIMEOUT_US = 2**63 - 1
"""What the protocol can say."""


class UnaryModel:
    """Owns the threads that wait for ``blip2``, one for each request that it takes."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start to serve."""
        folder = ModelFolder(args)
        self._at_once = folder.config.queue_size + folder.manifest.decoder.max_sequences + _SPARE_THREADS
        self._limits = ImageLimits(folder.config.max_image_bytes)
        self._free = threading.Semaphore(self._at_once)
        self._pool = ThreadPoolExecutor(self._at_once, "forwarded")
        self._watch = CancellationWatch[ForwardedCall](ForwardedCall.cancel)
        self._watch.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Forward the requests, or refuse them at once where all threads wait."""
        for request in requests:
            call = ForwardedCall(request)
            if self._free.acquire(blocking=False):
                self._watch.add(call)
                self._pool.submit(self._forward, call)
            else:
                call.fail(ServerBusyError(f"the queue is full: {self._at_once} requests are running or waiting"))

    def finalize(self) -> None:
        """Stop the threads; by now Triton has seen every request answered."""
        self._watch.close()
        self._pool.shutdown()

    def _forward(self, call: ForwardedCall) -> None:
        try:
            if call.is_cancelled():
                call.send(Answer("", "cancelled", num_input_tokens=0, num_output_tokens=0), final=True)
            else:
                call.forward(self._limits)
        except BlipstreamError as error:
            call.fail(error)
        except Exception as error:
            _log.exception("request %s could not be forwarded", call.request_id)
            call.fail(EngineError(f"the request could not be forwarded to {BLIP2}: {error!r}"))
        finally:
            self._watch.discard(call)
            self._free.release()


class ForwardedCall(TritonCall):
    """A request on its way to ``blip2`` and back."""

    def __init__(self, request: Any) -> None:
        super().__init__(request)
        self._forwarded_name = self.name or uuid.uuid4().hex
        self._output_names = list(request.requested_output_names())

    def forward(self, limits: ImageLimits) -> None:
        """Ask ``blip2``, wait, and pass its answer on.

        Raises:
            InvalidRequestError: a parameter is unknown, or an image too long to be passed on.
        """
        import triton_python_backend_utils as pb_utils

        check_parameters(self.parameters)
        if CANCEL_PARAMETER in self.parameters:
            raise InvalidRequestError(f"{CANCEL_PARAMETER} must be sent to {BLIP2}, but it was sent to {BLIP2_UNARY}")
        tensors = [tensor for tensor in self._request.inputs() if tensor.name() != "stream"]
        for tensor in tensors:
            if tensor.name() == IMAGE.name:
                for file in tensor.as_numpy().flat:
                    limits.check_length(file)
        responses = list(self._ask(tensors, {CALL_PARAMETER: self._forwarded_name}))
        error = forwarded_error(responses[0].error()) if responses[0].has_error() else None
        self.respond(pb_utils.InferenceResponse(responses[0].output_tensors(), error), final=True)

    def cancel(self) -> None:
        """Have ``blip2`` end the request; its answer still comes."""
        import triton_python_backend_utils as pb_utils

        nothing = pb_utils.Tensor(
            "text_input", np.array([[b""]], np.object_)
        )  # Triton refuses a request without inputs
        list(self._ask([nothing], {CANCEL_PARAMETER: self._forwarded_name}))

    def _ask(self, tensors: list[Any], parameters: Mapping[str, Any]) -> Any:
        import triton_python_backend_utils as pb_utils

        request = pb_utils.InferenceRequest(
            request_id=self.request_id,
            model_name=BLIP2,
            inputs=tensors,
            requested_output_names=self._output_names,
            timeout=min(round(self.timeout * 1e6), _MAX_TIMEOUT_US),
            parameters=dict(parameters),
        )
        return request.exec(decoupled=True)
