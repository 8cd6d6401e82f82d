"""Triton loads this file; the model itself is in the package."""

from blipstream.triton.graph import QFormerModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
