"""What a backend gets: entries (the tensors of a table), and passes over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeVar

from torch import Tensor, device

T = TypeVar("T")


class MaskKind(IntEnum):
    """Which elements of an entry a pass changes. csrc/axpy.h has the same numbers."""

    NONE = 0
    THRESHOLD = 1  # |src| <= threshold
    BOOL = 2  # mask_tensor: torch.bool, one byte an element
    BITS = 3  # mask_tensor: torch.uint8, one bit an element, lowest bit first
    RECORD = 4  # as THRESHOLD, and writes the bits to mask_tensor for later BITS passes


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

    Arithmetic is float32, with one rounding to dst's dtype at the end: to nearest, or stochastic.

    Numbers may be tensors on the entries' device, so that nobody has to wait for them: seeds as int64 scalars (the bits
    of uint64), scales as (groups, directions) and decays as (groups,) of float32 or float64.
    """

    seeds: Sequence[int] | Sequence[Tensor]
    scales: Sequence[Sequence[float]] | Tensor
    decays: Sequence[float] | Tensor
    stochastic: bool = False
    active: Sequence[int] | None = None  # indices of entries, None for all
    distribution: str = "normal"  # of z: one of spec.DISTRIBUTIONS
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[Pass], T]) -> T:
        """`make(self)`, computed at the first call with this key and kept, since one pass may go over many tables."""
        if (made := self._made.get(key)) is None:
            made = self._made[key] = make(self)
        return made

    @property
    def host_seeds(self) -> list[int]:
        """The seeds as numbers in [0, 2**64). Waits for the device if they are tensors."""
        return [int(s) % 2**64 for s in self.seeds]

    def on_host(self) -> Pass:
        """The same pass with numbers instead of tensors. Waits for the device if there are tensors."""
        if not any(isinstance(x, Tensor) for x in (*self.seeds, self.scales, self.decays)):
            return self
        scales = self.scales.tolist() if isinstance(self.scales, Tensor) else self.scales
        decays = self.decays.tolist() if isinstance(self.decays, Tensor) else self.decays
        return Pass(self.host_seeds, scales, decays, self.stochastic, self.active, self.distribution)


class Backend(Protocol):
    """A module or object with these two functions.

    It gets contiguous tensors, since `staged` copies all others; or, if its attribute `takes_any_layout` is true, any
    dense ones.
    """

    def unavailable(self, where: device) -> str | None:
        """Why it cannot run on that device here, or None if it can."""

    def prepare(self, entries: Sequence[Entry]) -> Callable[[Pass], None]:
        """Build a table once and return the function that applies a pass to it, an `InC` where possible.
        The tensors must outlive it.
        """


class InC(ABC):
    """A prepared table whose pass is one call of a C function, so that no exception from outside (Ctrl-C, a time limit)
    can come in the middle of it.
    """

    @abstractmethod
    def bound(self, do: Pass) -> Callable[[], object]:
        """The C function with its arguments, to be called without any."""

    def __call__(self, do: Pass) -> None:
        self.bound(do)()
