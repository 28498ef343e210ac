"""What ops hands to a backend: checked tensors, and what one pass over them does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeVar

from torch import Tensor, device

T = TypeVar("T")


class MaskKind(IntEnum):
    """How an entry's mask is given. csrc/axpy.h has the same numbers."""

    NONE = 0
    THRESHOLD = 1  # |src| <= threshold
    BOOL = 2  # mask_tensor: torch.bool, one byte an element
    BITS = 3  # mask_tensor: torch.uint8, one bit an element, lowest bit first
    RECORD = 4  # as THRESHOLD, and the bits are written to mask_tensor for later BITS passes


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a table. All tensors are of one device and already checked; mask_tensor is contiguous."""

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
    """dst <- round(decays[g] * src + m * sum_k scales[g][k] * z(seeds[k])) for each active entry of group g.

    Numbers may be tensors on the entries' device, so that nobody has to wait for them: seeds as int64 scalars (the bits
    of uint64), scales as (groups, directions) and decays as (groups,) of float32 or float64.
    """

    seeds: Sequence[int] | Sequence[Tensor]
    scales: Sequence[Sequence[float]] | Tensor
    decays: Sequence[float] | Tensor
    stochastic: bool = False
    active: Sequence[int] | None = None  # indices of entries, None for all
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[Pass], T]) -> T:
        """What `make` makes of this pass, made at the first call with the key: a pass may go over many tables."""
        if (made := self._made.get(key)) is None:
            made = self._made[key] = make(self)
        return made

    @property
    def host_seeds(self) -> list[int]:
        """The seeds as numbers in [0, 2**64); this waits for the device if they are tensors."""
        return [int(s) % 2**64 for s in self.seeds]

    def on_host(self) -> Pass:
        """With numbers instead of tensors; this waits for the device."""
        if not any(isinstance(x, Tensor) for x in (*self.seeds, self.scales, self.decays)):
            return self
        scales = self.scales.tolist() if isinstance(self.scales, Tensor) else self.scales
        decays = self.decays.tolist() if isinstance(self.decays, Tensor) else self.decays
        return Pass(self.host_seeds, scales, decays, self.stochastic, self.active)


class Backend(Protocol):
    """A backend is a module with these two functions. Entries are contiguous; or, if it has an attribute
    `takes_any_layout` that is true, dense: see `staged`, which is there for all others.
    """

    def unavailable(self, where: device) -> str | None:
        """Why it cannot run on that device here, or None if it can."""

    def prepare(self, entries: Sequence[Entry]) -> Callable[[Pass], None]:
        """Build the table once; the result applies a pass to it. The tensors must outlive it.
        It is an `InC`, if that can be.
        """


class InC(ABC):
    """What `Backend.prepare` returns, if a pass is one call of a C function: no exception from outside, such as Ctrl-C
    or a time limit, can come in the middle of it.
    """

    @abstractmethod
    def bound(self, do: Pass) -> Callable[[], object]:
        """The call, with its arguments."""

    def __call__(self, do: Pass) -> None:
        self.bound(do)()
