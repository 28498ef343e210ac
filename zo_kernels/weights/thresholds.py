"""Exact magnitude percentiles without sorting, in memory that does not grow with the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts import in_memory_order
from .shards import Shard

_CHUNK = 1 << 20
_COUNTED = 1 << 16  # at once: what fits a core's cache is counted twice as fast
_HALF = 1 << 16


@dataclass(frozen=True, slots=True)
class Percentile:
    """Of the magnitudes of a parameter.

    Attributes:
        h: the smallest magnitude for which at least `wanted` of them are at most h.
        below, upto: how many magnitudes are smaller than h, and at most h.
        size: elements.
        wanted: of them, those that are to take part: size - floor(sparsity * size).
    """

    h: float
    below: int
    upto: int
    size: int
    wanted: int

    @property
    def separates(self) -> bool:
        """Whether a mask |w| <= h is one of about the wanted share, in this step and in those to come.

        It is not if ties at h bring in so many that too many take part; nor at h = 0, for whatever its size: each zero
        moves in the first step, is larger than 0 from then on, and so is masked for ever.
        """
        return self.h > 0 and not too_many(self.size, self.wanted, self.upto)


def too_many(size: int, wanted: int, taking_part: int) -> bool:
    """Whether those that take part are more than twice what is wanted, or those left out less than half of it."""
    return taking_part > 2 * wanted or 2 * (size - taking_part) < size - wanted


def wanted(size: int, sparsity: float) -> int:
    """How many of so many elements are to take part."""
    return size - int(sparsity * size)


def _magnitude_bits(w: Tensor) -> Tensor:
    """|w| as int32: the order of non-negative floats is the order of their bits."""
    return w.float().abs().view(torch.int32)


def magnitude_percentile(w: Shard, sparsity: float) -> Percentile:
    """The h for which the smallest n - floor(sparsity * n) magnitudes of w, and no larger one, satisfy |w| <= h.

    Equal magnitudes at h are all included. Two passes of histograms (the high, then the low 16 bits), in chunks; of a
    shard's histograms the sums over all shards, so that h is the whole parameter's everywhere.

    Args:
        w: a parameter of float32, bfloat16 or float16, any shape.
        sparsity: the fraction to leave out, in [0, 1).

    Returns:
        It, with h a value of |w| (0.0 for an empty parameter).
    """
    flat = in_memory_order(w.tensor.detach())
    n = math.prod(w.whole)
    if n == 0:
        return Percentile(0.0, 0, 0, 0, 0)
    rank = wanted(n, sparsity)

    counts = torch.zeros(_HALF // 2, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        counts += torch.bincount(_magnitude_bits(chunk) >> 16, minlength=_HALF // 2)
    w.summed(counts)
    cumulative = counts.cumsum(0)
    high = int(torch.searchsorted(cumulative, rank))
    below = int(cumulative[high] - counts[high])

    counts = torch.zeros(_HALF, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        bits = _magnitude_bits(chunk)
        counts += torch.bincount(bits[(bits >> 16) == high] & (_HALF - 1), minlength=_HALF)
    w.summed(counts)
    cumulative = counts.cumsum(0)
    low = int(torch.searchsorted(cumulative, rank - below))
    upto = below + int(cumulative[low])
    below = upto - int(counts[low])
    h = torch.tensor(high << 16 | low, dtype=torch.int32, device="cpu").view(torch.float32).item()
    return Percentile(h, below, upto, n, rank)


def count_here(w: Shard, h: float, *, below: bool = False) -> Tensor:
    """How many of a shard's magnitudes are at most h, or smaller than it, as an int64 scalar on its device."""
    total = torch.zeros((), dtype=torch.int64, device=w.tensor.device)
    for chunk in in_memory_order(w.tensor.detach()).split(_COUNTED if w.tensor.device.type == "cpu" else _CHUNK):
        sizes = chunk.float().abs()
        total += torch.count_nonzero(sizes < h if below else sizes <= h)
    return total
