"""Finds the transformer blocks of a module, for an optimizer's `blocks=`."""

from ..weights.blocks import find_blocks

__all__ = ["find_blocks"]
