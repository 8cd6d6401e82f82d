"""TensorRT plans: engines that are built from a graph for the GPU at hand.

:mod:`~blipstream_export.plans.profiles` says for which shapes, :mod:`~blipstream_export.plans.builder` builds. Only the
latter imports TensorRT.
"""
