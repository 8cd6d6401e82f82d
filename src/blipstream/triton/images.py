"""The image models of the server, as ``blip2`` calls them by BLS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from blipstream.contract import IMAGE, IMAGE_EMBEDS, IMAGE_FEATURES, PIXEL_VALUES, QFORMER, SOFT_TOKENS, VISION_ENCODER
from blipstream.features import Features, ImageFeatures
from blipstream.instructions import instruction_inputs
from blipstream.triton.calls import Array, run_model
from blipstream.triton.inputs import ImageSource


class ImageModels:
    """Preprocessing, ViT and Q-Former. Each method blocks until the models have answered; any thread may call it."""

    def soft_tokens(self, image: ImageSource) -> Features:
        """Soft tokens (Q, D) of an image.

        Raises:
            InvalidRequestError: the image cannot be decoded.
            ServerBusyError: too many costly images are being decoded.
            EngineError: a model failed.
        """
        return _own(self._read(image, {}, [SOFT_TOKENS.name])[SOFT_TOKENS.name])

    def features(self, image: ImageSource, instruction: Sequence[int]) -> ImageFeatures:
        """Soft tokens (Q, D) of an image and an instruction, and the image's ``image_embeds`` (N, D_v).

        Raises:
            InvalidRequestError: the image cannot be decoded.
            ServerBusyError: too many costly images are being decoded.
            EngineError: a model failed.
        """
        outputs = self._read(image, instruction_inputs(instruction), [SOFT_TOKENS.name, IMAGE_EMBEDS.name])
        return ImageFeatures(_own(outputs[SOFT_TOKENS.name]), _own(outputs[IMAGE_EMBEDS.name]))

    def soft_tokens_of(self, image_embeds: Features, instruction: Sequence[int]) -> Features:
        """Soft tokens (Q, D) of ``image_embeds`` (N, D_v) and an instruction: the Q-Former alone runs.

        Raises:
            EngineError: it failed.
        """
        inputs = {IMAGE_EMBEDS.name: image_embeds[None], **instruction_inputs(instruction)}
        return _own(run_model(QFORMER, inputs, [SOFT_TOKENS.name])[SOFT_TOKENS.name])

    def _read(self, image: ImageSource, instruction: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        if image.pixels is not None:
            embeds = run_model(VISION_ENCODER, {PIXEL_VALUES.name: image.pixels[None]}, [IMAGE_EMBEDS.name])
            return {**embeds, **run_model(QFORMER, {**embeds, **instruction}, [SOFT_TOKENS.name])}
        if image.file is None:
            raise ValueError("an image source holds a file or pixels")
        file = np.array([[image.file]], np.object_)
        return run_model(IMAGE_FEATURES, {IMAGE.name: file, **instruction}, outputs)


def _own(batch: Array) -> Features:
    """The one row of a response, copied: its memory is Triton's."""
    return np.array(batch[0], np.float32)
