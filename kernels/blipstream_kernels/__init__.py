"""Fused cross-attention kernels."""
