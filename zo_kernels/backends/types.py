"""What ops hands to a backend: checked tensors, and what one pass over them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor, device


class MaskKind(IntEnum):
    """How an entry's mask is given. csrc/axpy.h has the same numbers."""

    NONE = 0
    THRESHOLD = 1  # |src| <= threshold
    BOOL = 2  # mask_tensor: torch.bool, one byte an element
    BITS = 3  # mask_tensor: torch.uint8, one bit an element, lowest bit first
    RECORD = 4  # as THRESHOLD, and the bits are written to mask_tensor for later BITS passes


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a table. All tensors are contiguous, of one device, and already checked."""

    dst: Tensor
    src: Tensor  # dst itself for an in-place pass; same dtype and number of elements
    param_id: int
    offset: int = 0  # index of dst's first element in the whole parameter
    group: int = 0  # which row of Pass.scales and Pass.decays applies
    mask: MaskKind = MaskKind.NONE
    threshold: float = 0.0
    mask_tensor: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """dst <- round(decays[g] * src + m * sum_k scales[g][k] * z(seeds[k])) for each active entry of group g."""

    seeds: Sequence[int]
    scales: Sequence[Sequence[float]]
    decays: Sequence[float]
    stochastic: bool = False
    active: Sequence[int] | None = None  # indices of entries, None for all


class Backend(Protocol):
    """A backend is a module with these two functions."""

    def unavailable(self, where: device) -> str | None:
        """Why it cannot run on that device here, or None if it can."""

    def prepare(self, entries: Sequence[Entry]) -> Callable[[Pass], None]:
        """Build the table once; the result applies a pass to it."""
