"""``preprocess``: encoded image files -> ``pixel_values``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from blipstream.contract import IMAGE, PIXEL_VALUES
from blipstream.errors import BlipstreamError, EngineError
from blipstream.image_files import ImageLimits
from blipstream.preprocess import ImageTransform
from blipstream.triton.calls import TritonCall
from blipstream.triton.image_pool import ImagePool
from blipstream.triton.model import ModelFolder

_log = logging.getLogger(__name__)

_THREADS = 64
"""Requests that wait for their images at once."""


class PreprocessModel:
    """Decodes, resizes and normalises images, several at a time. Each request is answered as soon as it is done.

    An image that cannot be decoded is an error of its own request and of no other.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the image section of the manifest, and the limits."""
        folder = ModelFolder(args)
        config = folder.config
        self._images = ImagePool(
            ImageTransform(folder.manifest.image, config.jpeg_oversampling),
            ImageLimits(config.max_image_bytes, config.max_image_pixels),
            config.max_image_seconds,
            folder.threads,
        )
        self._threads = ThreadPoolExecutor(_THREADS, "image")

    def execute(self, requests: Sequence[Any]) -> None:
        """Transform the images of all requests, which are answered by their response senders."""
        for request in requests:
            self._threads.submit(self._answer, TritonCall(request))

    def finalize(self) -> None:
        """End the processes; by now Triton has seen every request answered."""
        self._threads.shutdown()
        self._images.close()

    def _answer(self, call: TritonCall) -> None:
        import triton_python_backend_utils as pb_utils

        try:
            files = call.inputs()[IMAGE.name].flat
            pixels = np.stack([self._images.decode(file) for file in files])  # (B, 3, S, S)
        except BlipstreamError as error:
            call.fail(error)
        except Exception as error:
            _log.exception("an image could not be transformed")
            call.fail(EngineError(f"the image could not be transformed: {error!r}"))
        else:
            response = pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(PIXEL_VALUES.name, pixels)])
            call.respond(response, final=True)
