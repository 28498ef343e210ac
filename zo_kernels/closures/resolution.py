"""Finds losses that are too coarse: then g = (L+ - L-) / 2ε is mostly their rounding.

A loss in 16 bits shows in its dtype. Any other coarse loss shows in its values: however it was converted since
(`loss.item()`, `loss.float()`, a mean of several), it stays a multiple of a power of two, here called its grain. If L+
and L- differ by only a few grains, or not at all, in many steps in a row, then the loss does not resolve the
perturbation.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..interrupts import Call
from ..trajectory import Difference, Kind, Record
from ..warn import Warner
from .losses import Refused

COARSE, _EQUAL, _DIVERGED = "resolution", "no difference", "divergence"  # topics of the reports
# Steps in a row before a report. Healthy losses differ by thousands of grains: in float32 by 1e-3 L, a grain is 1e-7 L.
_STEPS = 10
_EQUAL_STEPS = 20  # an accuracy is often the same twice
_FEW_GRAINS = 8  # with a difference of so few, g has three bits at most
_COUNT_BELOW = 128  # a loss of fewer grains is a count, such as an accuracy; bfloat16, with 8 bits, reaches 128
_DIVERGED_FACTOR = 1e3  # a loss that has grown so much has diverged
_CONVERGED = 1e-3  # a loss below this fraction of the largest one is expected to be coarse
NARROW = frozenset((torch.bfloat16, torch.float16))
_FLOAT32 = (
    "compute it in float32, from float32 logits (F.cross_entropy(logits.float(), labels)): float() and item() do not "
    "help once it is rounded"
)


def narrow_loss_message(loss: Tensor, eps: float, difference: Difference) -> str:
    """The message for a loss in 16 bits: which steps g comes in. Does not read a value on a GPU."""
    info, what = torch.finfo(loss.dtype), f"closure: expected a float32 loss, got one of {loss.dtype}"
    known = loss.device.type == "cpu" and loss.numel() == 1 and not hasattr(loss, "full_tensor")
    size = abs(loss.item()) if known else math.nan
    if math.isfinite(size):
        grain = info.eps * 2.0 ** math.floor(math.log2(max(size, info.smallest_normal)))
        steps = (
            f"at {size:.4g} it comes in steps of {grain:.3g}, so g = {difference.formula} comes in steps of "
            f"{_step(grain, eps, difference)}"
        )
    else:
        steps = (
            f"it comes in steps of {info.eps / 2:.3g} to {info.eps:.3g} of its size, so for a loss of 1, "
            f"g = {difference.formula} comes in steps of {_step(info.eps, eps, difference)}"
        )
    return f"{what}: {steps}; {_FLOAT32}; or use an eps far above {eps:g}"


def _step(grain: float, eps: float, difference: Difference) -> str:
    return f"{grain / difference.span(eps):.3g}"


def _grain(value: float) -> float:
    """The largest power of two that divides a float; infinity for 0."""
    n, d = value.as_integer_ratio()
    if d != 1:
        return 1.0 / d if d.bit_length() < 1000 else 0.0
    return float(n & -n) if n else math.inf


@dataclass(frozen=True, slots=True)
class _Coarse:
    """A series of coarse steps: in each, L+ and L- differ by a few grains at most.

    Attributes:
        steps: how many steps in a row.
        difference, size: the largest |L+ - L-| and the largest |L| in them.
        grain: the common grain of all their losses.
    """

    steps: int
    difference: float
    grain: float
    size: float

    @property
    def is_count(self) -> bool:
        """Whether the loss counts things, as an accuracy does, so that it is coarse by nature."""
        return self.size < _COUNT_BELOW * self.grain

    def after(self, before: _Coarse | None) -> _Coarse:
        """Continue the series `before` with this step; begin anew if that was not coarse by the grain known now."""
        if before is None:
            return self
        difference, grain = max(self.difference, before.difference), min(self.grain, before.grain)
        if difference > _FEW_GRAINS * grain:
            return self
        return _Coarse(self.steps + before.steps, difference, grain, max(self.size, before.size))


def _coarse(record: Record) -> _Coarse | None:
    """The series of one step, or None if one of its pairs differs by more than a few grains."""
    difference, grain, size, pairs = 0.0, math.inf, 0.0, (*record.losses, *record.anchor_losses)
    if record.difference.one_sided and len(pairs) > 1:  # what tells directions apart is how their losses differ
        pairs = tuple((loss, pairs[0][0]) for loss, _ in pairs[1:])
    for plus, minus in pairs:
        difference = max(difference, abs(plus - minus))
        grain = min(grain, _grain(plus), _grain(minus))
        if difference > _FEW_GRAINS * grain:
            return None
        size = max(size, abs(plus), abs(minus))
    return _Coarse(1, difference, grain, size)


class Resolution:
    """Checks the losses of each recorded step. Losses on a GPU are checked later, when they have arrived."""

    def __init__(self, warner: Warner):
        self._warner = warner
        self._arrived: deque[Record] = deque()
        # Separately for steps at anchors (True), which have another closure, and for others (False):
        self._coarse: dict[bool, _Coarse | None] = {}
        self._equal: dict[bool, int] = {}  # steps in a row with L+ = L-
        self._largest = 0.0  # the largest |L| so far
        self._first = 0.0  # the first |L| that was not 0
        self._fine = False  # whether any step had losses that were not coarse

    def on_arrival(self, record: Record) -> Call:
        """Return a call that queues the losses of a step that was taken, for the next `check_arrived`."""
        return partial(self._arrived.append, record)

    def check_arrived(self) -> None:
        """Check the losses that have arrived.

        Raises:
            ValueError: see `Warner`.
        """
        while self._arrived:
            if report := self._report_on(self._arrived.popleft()):
                self._warner.warn(*report)

    def check(self, record: Record) -> None:
        """Check the losses of a step that is about to be taken.

        Raises:
            Refused: where `Warner` would raise ValueError.
        """
        if report := self._report_on(record):
            if self._warner.strict:
                raise Refused(ValueError, report[1], of="")
            self._warner.warn(*report)

    def _report_on(self, record: Record) -> tuple[str, str] | None:
        """The topic and message of what to report after this step, or None."""
        if not record.losses:
            return None
        size, anchor = abs(record.losses[0][0]), record.kind is Kind.ANCHOR
        if not math.isfinite(size):
            return None  # the device skipped this step, and made all its losses NaN
        self._largest, self._first = max(self._largest, size), self._first or size
        if (step := _coarse(record)) is None:
            self._coarse[anchor], self._equal[anchor], self._fine = None, 0, True
            return None
        if self._fine and size < _CONVERGED * self._largest:
            return None
        now = self._coarse[anchor] = step.after(self._coarse.get(anchor))
        equal = self._equal[anchor] = 0 if step.difference else self._equal.get(anchor, 0) + 1
        name = "full_closure" if anchor else "closure"
        if self._warner.warned(COARSE):
            return None  # that report covers differences of 0, too
        if now.steps >= _STEPS and size > _DIVERGED_FACTOR * self._first:
            return _DIVERGED, _divergence_message(name, self._first, record)
        if now.steps >= _STEPS and now.difference and not now.is_count:
            return COARSE, _coarse_message(name, now, record)
        if equal >= _EQUAL_STEPS and not self._warner.warned(_EQUAL):
            return _EQUAL, _equal_message(name, equal, record)
        return None


def _divergence_message(name: str, first: float, record: Record) -> str:
    return (
        f"{name}: losses have grown from {first:.4g} to {record.losses[0][0]:.4g}, and {record.difference.losses} no "
        "longer differ: the run has diverged; begin again with a smaller learning rate"
    )


def _equal_message(name: str, steps: int, record: Record) -> str:
    return (
        f"{name}: {record.difference.losses} were equal, bit for bit, in {steps} steps in a row (now "
        f"{record.losses[0][0]:.6g}), so g is 0 and nothing is trained. Perhaps the loss does not depend on the "
        "trained weights: the closure calls another model or a copy, or the head is frozen, replaced or unused. "
        f"Perhaps eps is too small (got {record.eps:g}). Or the loss has few values, as in 16 bits or an accuracy: use "
        "a larger batch or eps"
    )


def _coarse_message(name: str, found: _Coarse, record: Record) -> str:
    difference, step = record.difference, _step(found.grain, record.eps, record.difference)
    return (
        f"{name}: {difference.losses} differed by {found.difference:.3g} at most in {found.steps} steps in a row, and "
        f"losses of {found.size:.6g} come in steps of {found.grain:.3g} here, so g = {difference.formula} comes in "
        f"steps of {step} and is mostly rounding; use an eps far above {record.eps:g}, remove any constant that makes "
        f"the loss large, and if the loss comes from 16 bits, {_FLOAT32}"
    )
