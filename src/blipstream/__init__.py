"""Blipstream: serve the BLIP-2 family on NVIDIA Triton.

This package holds what serving needs and imports neither torch nor transformers.
"""

__version__ = "0.1.0"
