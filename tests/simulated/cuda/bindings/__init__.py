"""NVIDIA's package of this name, simulated: see :mod:`cuda.bindings.runtime`."""
