"""Triton loads this file; the model itself is in the package."""

from blipstream.triton.preprocess import PreprocessModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
