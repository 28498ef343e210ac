"""Exact magnitude percentiles without sorting, in memory that does not grow with the tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layouts import in_memory_order
from .shards import Shard

_CHUNK = 1 << 20
_HALF = 1 << 16


def _magnitude_bits(w: Tensor) -> Tensor:
    """|w| as int32: the order of non-negative floats is the order of their bits."""
    return w.float().abs().view(torch.int32)


def magnitude_threshold(w: Shard, sparsity: float) -> float:
    """The h for which the smallest n - floor(sparsity * n) magnitudes of w, and no larger one, satisfy |w| <= h.

    Equal magnitudes at h are all included. Two passes of histograms (the high, then the low 16 bits), in chunks; of a
    shard's histograms the sums over all shards, so that h is the whole parameter's everywhere.

    Args:
        w: a parameter of float32, bfloat16 or float16, any shape.
        sparsity: the fraction to leave out, in [0, 1).

    Returns:
        h, a value of |w| (0.0 for an empty parameter).
    """
    flat = in_memory_order(w.tensor.detach())
    n = math.prod(w.whole)
    if n == 0:
        return 0.0
    rank = n - int(sparsity * n)

    counts = torch.zeros(_HALF // 2, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        counts += torch.bincount(_magnitude_bits(chunk) >> 16, minlength=_HALF // 2)
    w.summed(counts)
    cumulative = counts.cumsum(0)
    high = int(torch.searchsorted(cumulative, rank))
    rank -= int(cumulative[high] - counts[high])

    counts = torch.zeros(_HALF, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        bits = _magnitude_bits(chunk)
        counts += torch.bincount(bits[(bits >> 16) == high] & (_HALF - 1), minlength=_HALF)
    w.summed(counts)
    low = int(torch.searchsorted(counts.cumsum(0), rank))
    return torch.tensor(high << 16 | low, dtype=torch.int32, device="cpu").view(torch.float32).item()
