"""Fused cross-attention of the Q-Former for NVIDIA GPUs, in the Triton language.

The Triton language (``import triton``) is a compiler of GPU kernels, and no part of Triton Inference Server.

Example::

    from blipstream_kernels.launch import cross_attention

    output = cross_attention(query, image, key_weight, key_bias, value_weight, value_bias, num_heads=12)
"""
