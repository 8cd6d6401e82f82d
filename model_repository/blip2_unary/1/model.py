"""Triton loads this file; the model itself is in the package."""

from blipstream.triton.unary import UnaryModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
