"""Fingerprints of whole parameters, even where this process holds one shard of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.transfer import on_device
from ..trajectory.fingerprint import as_text, combined, summed
from .shards import Shard, summed_over


def fingerprints(shards: Sequence[Shard]) -> list[str]:
    """The fingerprint (`trajectory.fingerprint`) of each whole parameter; all processes must call this together."""
    return [as_text(total) for total in _totals(shards).tolist()]


def combined_fingerprint(shards: Sequence[Shard]) -> Tensor:
    """One fingerprint for all whole parameters, as an int64 scalar; all processes must call this together."""
    return combined(_totals(shards))


def sums_here(shards: Sequence[Shard]) -> Tensor:
    """What each shard adds to its parameter's fingerprint, as int64 (shards,) on their device."""
    return torch.stack([summed(shard.tensor, shard.runs) for shard in shards])


def _totals(shards: Sequence[Shard]) -> Tensor:
    sums = summed_over(shards, sums_here(shards))
    return sums + on_device([math.prod(shard.whole) for shard in shards], torch.int64, sums.device)
