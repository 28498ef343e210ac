"""Normals back to uniforms by the normal distribution function, and how many of a uniform's bits mean something.

A float32 between 1 and 2 stands for all numbers within half an ulp, 2^-24, of it, so the function's values at float32
lie up to 2^-25 apart, and a cell of 2^-b holds only some 2^(25-b) of them: its probability is off by a part in that.
`noticed` says after how many values a chi-square over all cells would see it. 16 bits are seen after 10^9 only,
which is more than any test of a battery looks at, and two of them make a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = 16


def words(normals: Iterator[Tensor]) -> Iterator[NDArray[np.uint32]]:
    """Tensors of an even number of normals -> words of two neighbours' BITS highest bits, the first one's on top."""
    for x in normals:
        cells = torch.special.ndtr(x.double()).mul_(2**BITS).to(torch.int64).clamp_(max=2**BITS - 1)
        yield ((cells[0::2] << BITS) | cells[1::2]).cpu().numpy().astype(np.uint32)


def noticed(bits: int) -> float:
    """After how many values the rounding to float32 moves a chi-square of 2^bits cells by its standard deviation."""
    from scipy.special import ndtr, ndtri

    edges = np.arange(1, 2**bits) / 2**bits
    # The first float32 at or above each edge, and where the numbers that round to it begin.
    first = ndtri(edges).astype(np.float32)
    first = np.where(ndtr(first.astype(np.float64)) < edges, np.nextafter(first, np.float32(np.inf)), first)
    before = np.nextafter(first, np.float32(-np.inf))
    begin = (first.astype(np.float64) + before.astype(np.float64)) / 2
    below = np.concatenate([[0.0], ndtr(begin), [1.0]])
    off = np.diff(below) * 2**bits - 1
    return math.sqrt(2 * 2**bits) / float((off**2).mean())
