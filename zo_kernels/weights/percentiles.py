"""Exact magnitude percentiles without sorting, in memory that does not grow with the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, device

from ..layouts import in_memory_order
from .shards import Shard

_CHUNK = 1 << 20
_CPU_CHUNK = 1 << 16  # counting what fits a core's cache is twice as fast
_HALF = 1 << 16


@dataclass(frozen=True, slots=True)
class Percentile:
    """A percentile of a parameter's magnitudes.

    Attributes:
        h: the smallest magnitude such that at least `target` magnitudes are at most h.
        below, upto: how many magnitudes are smaller than h, and how many are at most h.
        size: elements of the parameter.
        target: how many of them should take part: size - floor(sparsity * size).
    """

    h: float
    below: int
    upto: int
    size: int
    target: int

    @property
    def separates(self) -> bool:
        """Whether a mask |w| <= h lets about the target take part, in this step and in later ones.

        It does not if ties at h bring in far too many. Nor does it at h = 0: every zero moves in the first step, is
        larger than 0 from then on, and so is masked for ever.
        """
        return self.h > 0 and not far_too_many(self.size, self.target, self.upto)


def chunk_of(where: device) -> int:
    """How many elements to compare at a time on a device."""
    return _CPU_CHUNK if where.type == "cpu" else _CHUNK


def far_too_many(size: int, target: int, taking_part: int) -> bool:
    """Whether more than twice the target take part, or fewer than half of the others are masked."""
    return taking_part > 2 * target or 2 * (size - taking_part) < size - target


def target_count(size: int, sparsity: float) -> int:
    """How many of `size` elements should take part."""
    return size - int(sparsity * size)


def _magnitude_bits(w: Tensor) -> Tensor:
    """The bits of |w| as int32: non-negative floats sort as their bits do."""
    return w.float().abs().view(torch.int32)


def magnitude_percentile(w: Shard, sparsity: float) -> Percentile:
    """Find the h such that |w| <= h holds for the smallest n - floor(sparsity * n) magnitudes and for no larger one.

    All magnitudes equal to h are included. Two passes in chunks build histograms of the high and then of the low 16
    bits. The histograms of shards are summed, so that every process gets the h of the whole parameter.

    Args:
        w: a parameter of float32, bfloat16 or float16, any shape.
        sparsity: the fraction to mask, in [0, 1).

    Returns:
        The percentile; its h is a value of |w|, or 0.0 for an empty parameter.
    """
    flat = in_memory_order(w.tensor.detach())
    n = math.prod(w.whole)
    if n == 0:
        return Percentile(0.0, 0, 0, 0, 0)
    rank = target_count(n, sparsity)

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
    """Count a shard's magnitudes that are at most h, or with `below` smaller than h: an int64 scalar on its device."""
    total = torch.zeros((), dtype=torch.int64, device=w.tensor.device)
    for chunk in in_memory_order(w.tensor.detach()).split(chunk_of(w.tensor.device)):
        sizes = chunk.float().abs()
        total += torch.count_nonzero(sizes < h if below else sizes <= h)
    return total
