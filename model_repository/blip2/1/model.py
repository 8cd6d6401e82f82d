"""Triton loads this file; the model itself is in the package."""

from blipstream.triton.decoder import DecoderModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
