"""Transformer blocks, to be given as `blocks=`."""

from ..weights.blocks import find_blocks

__all__ = ["find_blocks"]
