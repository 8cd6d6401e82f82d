"""``preprocess``: encoded image files -> ``pixel_values``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from blipstream.contract import IMAGE, PIXEL_VALUES
from blipstream.errors import BlipstreamError, EngineError
from blipstream.preprocess import ImageLimits, ImageTransform, limit_pillow
from blipstream.triton.calls import triton_error
from blipstream.triton.model import ModelFolder


class PreprocessModel:
    """Decodes, resizes and normalises the images of a batch, several at a time.

    Pillow lets other threads run while it decodes and resizes. An image that cannot be decoded is an error of its own
    request and of no other.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the image section of the manifest, and the limits."""
        folder = ModelFolder(args)
        self._transform = ImageTransform(folder.manifest.image, folder.config.jpeg_oversampling)
        self._limits = ImageLimits(folder.config.max_image_bytes, folder.config.max_image_pixels)
        limit_pillow(self._limits)
        self._pool = ThreadPoolExecutor(folder.threads, "image-decoder")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Transform the images of all requests; one response each, in their order."""
        import triton_python_backend_utils as pb_utils

        files = [list(pb_utils.get_input_tensor_by_name(request, IMAGE.name).as_numpy().flat) for request in requests]
        pixels = iter(list(self._pool.map(self._decode, (file for group in files for file in group))))
        return [self._response([next(pixels) for _ in group]) for group in files]

    def finalize(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()

    def _decode(self, file: bytes) -> npt.NDArray[np.float32] | BlipstreamError:
        try:
            return self._transform.decode(file, self._limits)
        except BlipstreamError as error:
            return error
        except Exception as error:  # a fault of this image must not touch the others of the batch
            return EngineError(f"the image could not be transformed: {error!r}")

    def _response(self, results: Sequence[npt.NDArray[np.float32] | BlipstreamError]) -> Any:
        import triton_python_backend_utils as pb_utils

        faults = [result for result in results if isinstance(result, BlipstreamError)]
        if faults:
            return pb_utils.InferenceResponse(output_tensors=[], error=triton_error(faults[0]))
        pixels = np.stack([result for result in results if not isinstance(result, BlipstreamError)])  # (b, 3, S, S)
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(PIXEL_VALUES.name, pixels)])
