"""Fingerprints of whole parameters, of which this process may hold a shard only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.transfer import on_device
from ..trajectory.fingerprint import as_text, combined, summed
from .shards import Shard


def sums_here(shards: Sequence[Shard]) -> Tensor:
    """Of each shard what it adds to its parameter's fingerprint, as int64 (shards,) on their device."""
    return torch.stack([summed(shard.tensor, shard.runs) for shard in shards])


def summed_over(shards: Sequence[Shard], sums: Tensor) -> Tensor:
    """Values of each shard added up over its whole parameter, in place; the processes that hold its shards must call
    this together.
    """
    groups: dict[Any, list[int]] = {}
    for i, shard in enumerate(shards):
        for group in shard.groups:
            groups.setdefault(group, []).append(i)
    # In an order that all processes share: that of the parameters, then of each one's groups.
    for group, members in groups.items():
        part = sums[members]
        torch.distributed.all_reduce(part, group=group)
        sums[members] = part
    return sums


def _sums(shards: Sequence[Shard]) -> Tensor:
    """The fingerprint of each whole parameter, as int64; the processes that hold its shards must call this together."""
    sums = summed_over(shards, sums_here(shards))
    return sums + on_device([math.prod(shard.whole) for shard in shards], torch.int64, sums.device)


def fingerprints(shards: Sequence[Shard]) -> list[str]:
    """The fingerprint (`trajectory.fingerprint`) of each whole parameter; to be called by all processes together."""
    return [as_text(total) for total in _sums(shards).tolist()]


def combined_fingerprint(shards: Sequence[Shard]) -> Tensor:
    """One for all whole parameters, as an int64 scalar; to be called by all processes together."""
    return combined(_sums(shards))
