"""Losses that are too coarse for a difference of two: what g = (L+ - L-) / 2ε comes out as is then their rounding.

A loss in 16 bits is told by its dtype. Others are told by their values: whatever a loss was computed in, and whatever
it was made of it since (`loss.item()`, `loss.float()`, a mean of several), it remains a multiple of a power of two, its
grain, which is seen in the values themselves. Differences of a few grains, or none, in many steps in a row say that the
weights are not heard in the loss.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..interrupts import Call
from ..trajectory import Kind, Record
from ..warn import Warner
from .losses import Refused

COARSE, _EQUAL, _DIVERGED = "resolution", "no difference", "divergence"  # what is said is about
# Steps in a row before anything is said. Healthy losses differ by thousands of grains: in float32 by 1e-3 L of 1e-7 L.
_STEPS = 10
_EQUAL_STEPS = 20  # an accuracy is often the same twice
_FEW = 8  # grains: g has no more than three bits
_A_COUNT = 128  # fewer grains than this in a loss are things counted; a number of 8 bits, bfloat16's, has as many
_GROWN = 1e3
_LITTLE = 1e-3  # of the largest loss: what has come down to this has little more to tell
_NARROW = frozenset((torch.bfloat16, torch.float16))
_FLOAT32 = (
    "compute it in float32, from float32 logits (F.cross_entropy(logits.float(), labels)): once it is rounded, float() "
    "and item() are of no help"
)


def is_narrow(loss: Tensor) -> bool:
    """Whether it has floating-point numbers of 16 bits."""
    return loss.dtype in _NARROW


def told_of_narrow(loss: Tensor, eps: float) -> str:
    """What a loss of so few bits comes to. A GPU's value is not looked at."""
    info, what = torch.finfo(loss.dtype), f"closure: expected a float32 loss, got one of {loss.dtype}"
    known = loss.device.type == "cpu" and loss.numel() == 1 and not hasattr(loss, "full_tensor")
    size = abs(loss.item()) if known else math.nan
    if math.isfinite(size):
        grain = info.eps * 2.0 ** math.floor(math.log2(max(size, info.smallest_normal)))
        steps = (
            f"at {size:.4g} it comes in steps of {grain:.3g}, so g = (L+ - L-) / 2 eps in steps of {_step(grain, eps)}"
        )
    else:
        steps = (
            f"it comes in steps of {info.eps / 2:.3g} to {info.eps:.3g} of its size, so g = (L+ - L-) / 2 eps for a "
            f"loss of 1 in steps of {_step(info.eps, eps)}"
        )
    return f"{what}: {steps}, and |g| is 0 or a multiple of that; {_FLOAT32}; or take an eps far above {eps:g}"


def _step(grain: float, eps: float) -> str:
    return f"{grain / (2 * eps):.3g}"


def _grain(value: float) -> float:
    """The largest power of two that it is a multiple of; infinity for 0."""
    n, d = value.as_integer_ratio()
    if d != 1:
        return 1.0 / d if d.bit_length() < 1000 else 0.0
    return float(n & -n) if n else math.inf


@dataclass(frozen=True, slots=True)
class _Coarse:
    """Steps in a row whose losses differ by a few grains at most, all of them together.

    Attributes:
        difference, size: the largest |L+ - L-|, and |L|.
        grain: of all of their losses.
    """

    steps: int
    difference: float
    grain: float
    size: float

    @property
    def is_count(self) -> bool:
        return self.size < _A_COUNT * self.grain

    def after(self, before: _Coarse | None) -> _Coarse:
        """With the steps before; without them, if they were not coarse by the grain that is known now."""
        if before is None:
            return self
        difference, grain = max(self.difference, before.difference), min(self.grain, before.grain)
        if difference > _FEW * grain:
            return self
        return _Coarse(self.steps + before.steps, difference, grain, max(self.size, before.size))


def _coarse(record: Record) -> _Coarse | None:
    """A step's, or None if it is a fine one, which one pair tells."""
    difference, grain, size = 0.0, math.inf, 0.0
    for plus, minus in (*record.losses, *record.anchor_losses):
        difference = max(difference, abs(plus - minus))
        grain = min(grain, _grain(plus), _grain(minus))
        if difference > _FEW * grain:
            return None
        size = max(size, abs(plus), abs(minus))
    return _Coarse(1, difference, grain, size)


class Resolution:
    """Looks at the losses of each step that is recorded; those on a GPU it gets later, when they are there."""

    def __init__(self, warner: Warner):
        self._warner = warner
        self._arrived: deque[Record] = deque()
        # Of anchors, which another closure is for, and of other steps:
        self._coarse: dict[bool, _Coarse | None] = {}
        self._equal: dict[bool, int] = {}  # steps in a row
        self._largest = 0.0  # |L| so far
        self._first = 0.0  # |L|, of the first that was not 0
        self._fine = False  # whether any losses differed well

    def arriving(self, record: Record) -> Call:
        """A call that notes the losses of a step that was taken; `look` is to follow."""
        return partial(self._arrived.append, record)

    def look(self) -> None:
        """At what has arrived.

        Raises:
            ValueError: see `Warner`.
        """
        while self._arrived:
            if told := self._told_of(self._arrived.popleft()):
                self._warner.warn(*told)

    def look_at(self, record: Record) -> None:
        """At the losses of a step that is about to be taken.

        Raises:
            Refused: where `Warner` would raise ValueError.
        """
        if told := self._told_of(record):
            if self._warner.strict:
                raise Refused(ValueError, told[1], of="")
            self._warner.warn(*told)

    def _told_of(self, record: Record) -> tuple[str, str] | None:
        """What is to be said after this step, and what it is about."""
        if not record.losses:
            return None
        size, anchor = abs(record.losses[0][0]), record.kind is Kind.ANCHOR
        if not math.isfinite(size):
            return None  # it was refused, on a device, where all losses are then not a number
        self._largest, self._first = max(self._largest, size), self._first or size
        if (step := _coarse(record)) is None:
            self._coarse[anchor], self._equal[anchor], self._fine = None, 0, True
            return None
        if self._fine and size < _LITTLE * self._largest:
            return None
        now = self._coarse[anchor] = step.after(self._coarse.get(anchor))
        equal = self._equal[anchor] = 0 if step.difference else self._equal.get(anchor, 0) + 1
        name = "full_closure" if anchor else "closure"
        if self._warner.warned(COARSE):
            return None  # which says that differences may be 0, too
        if now.steps >= _STEPS and size > _GROWN * self._first:
            return _DIVERGED, _told_of_divergence(name, self._first, record)
        if now.steps >= _STEPS and now.difference and not now.is_count:
            return COARSE, _told_of_coarse(name, now, record)
        if equal >= _EQUAL_STEPS and not self._warner.warned(_EQUAL):
            return _EQUAL, _told_of_equal(name, equal, record)
        return None


def _told_of_divergence(name: str, first: float, record: Record) -> str:
    return (
        f"{name}: losses have grown from {first:.4g} to {record.losses[0][0]:.4g}, and no longer tell L+ from L-: the "
        "run has diverged; begin again with a smaller learning rate"
    )


def _told_of_equal(name: str, steps: int, record: Record) -> str:
    return (
        f"{name}: L+ and L- were equal, bit for bit, in {steps} steps in a row (now {record.losses[0][0]:.6g}), "
        "so g is 0 and the loss leads nowhere. It may not depend on the weights that are trained: a closure that calls "
        "another model or a copy, a head that is frozen, replaced or read by nobody. Or eps is too small for it (got "
        f"{record.eps:g}). Or it has few values, as a loss of 16 bits or an accuracy, which needs a larger batch or eps"
    )


def _told_of_coarse(name: str, found: _Coarse, record: Record) -> str:
    return (
        f"{name}: L+ and L- differed by {found.difference:.3g} at most in {found.steps} steps in a row, and losses of "
        f"{found.size:.6g} come in steps of {found.grain:.3g} here, so g = (L+ - L-) / 2 eps comes in steps of "
        f"{_step(found.grain, record.eps)} and is mostly rounding; take an eps far above {record.eps:g}; leave away a "
        f"constant that makes the loss large; if it comes from 16 bits, {_FLOAT32}"
    )
