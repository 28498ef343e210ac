"""Estimates how much memory pinned weights take; an earlier name of `zo_kernels.weights.pinned`."""

from ..weights.pinned import bytes_pinned

__all__ = ["bytes_pinned"]
