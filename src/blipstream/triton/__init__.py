"""Triton models and the server launcher; the only package that imports ``triton_python_backend_utils``."""
