"""Estimates what `execution_device` needs; an earlier name of `zo_kernels.perturbation.streamed`."""

from ..perturbation.streamed import bytes_on_device

__all__ = ["bytes_on_device"]
