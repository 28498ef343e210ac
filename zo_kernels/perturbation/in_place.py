"""Perturbation in place: passes move the weights themselves to θ + εz, to θ - εz and back.

If a closure writes to a weight at θ + εz, the pass back cannot restore θ. So a closure's writes are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends.types import Pass
from ..closures.losses import Refused, call
from ..interrupts import Call, at_once
from ..modes import remove_mode, uncompiled
from ..weights.rows import Row, Seed, Value, minus
from ..weights.tables import Weights
from .aliases import Spans, tensors_in, written
from .place import Probes

_PLAIN = (Tensor, torch.nn.Parameter)
_CURES = (
    "use perturb='in_forward', which does not move them, or let it write before the optimizer is made (by a forward of "
    "the model), or between two steps"
)


class InPlace:
    """The place `perturb="in_place"`: see `place.Place`."""

    name = "in_place"

    def __init__(self, weights: Weights):
        self._weights = weights

    def probes(
        self,
        active: Sequence[int] | None,
        *,
        seed: int,
        step: int,
        guarded: bool,
        from_anchor: bool,
        restore: Callable[[], None] | None,
    ) -> Probes:
        unwritten = Unwritten(self._weights, guarded)
        if restore is None:
            return Walk(self._weights, active, unwritten)
        return (WalkFromAnchor if from_anchor else RestoredWalk)(self._weights, active, unwritten, restore)

    def restore(self) -> None:
        """Do nothing: probes restore the weights that they moved."""

    def is_still(self) -> bool:
        return False

    def writes(self) -> tuple[set[int], bool]:
        return set(), False

    def unperturbed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def memory_in_use(self) -> list[Any]:
        return []


class Mover(Protocol):
    """The methods of `Weights` that `Walk` uses; a replay passes a queue instead."""

    def describe(
        self,
        deltas: Mapping[Any, Value | Row],
        decays: Row | None,
        active: Sequence[int] | None,
    ) -> Pass:
        """See `Weights.describe`."""

    def run(self, do: Pass, *, record: bool = False, then: Sequence[Call] = ()) -> None:
        """See `Weights.run`."""


class Walk:
    """Moves the weights by one pass a move; the last pass moves back to θ and updates at once.

    Args:
        weights: the weights to move, in place.
        active: indices of those that take part, None for all.
        unwritten: evaluates closures; None in a replay, which evaluates no losses.
        record: whether the first move takes the masks.
    """

    def __init__(
        self,
        weights: Mover,
        active: Sequence[int] | None,
        unwritten: Unwritten | None = None,
        *,
        record: bool = True,
    ):
        self._weights, self._active, self._record, self._unwritten = weights, active, record, unwritten
        self.offset: dict[Seed, float] = {}
        self.moves = 0

    def to(self, offset: Mapping[Seed, float]) -> None:
        if not offset and self._unwritten is not None:
            self._unwritten.leave()
        seeds = [*self.offset, *(s for s in offset if s not in self.offset)]
        deltas = {s: offset.get(s, 0.0) - self.offset.get(s, 0.0) for s in seeds}
        deltas = {s: d for s, d in deltas.items() if d != 0.0}
        noted = self._noting(offset)
        if deltas:
            do = self._weights.describe(deltas, None, self._active)
            self._weights.run(do, record=self._record, then=[*noted, partial(setattr, self, "_record", False)])
        else:
            at_once(noted)

    def _noting(self, offset: Mapping[Seed, float]) -> list[Call]:
        """Return the calls that note that the weights are at an offset."""
        moves = self.moves + bool(offset)
        return [partial(setattr, self, "offset", dict(offset)), partial(setattr, self, "moves", moves)]

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        assert self._unwritten is not None
        return self._unwritten.evaluate(closure)

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call] = ()) -> None:
        # With w = θ + offset * z, the restored and updated weights are decay * w + (update - decay * offset) * z.
        zero = [0.0] * len(decays)
        seeds = [*self.offset, *(s for s in update if s not in self.offset)]
        deltas = {s: minus(update.get(s, zero), decays, self.offset.get(s, 0.0)) for s in seeds}
        self._weights.run(self._weights.describe(deltas, decays, self._active), then=[*self._noting({}), *then])


class RestoredWalk(Walk):
    """A `Walk` that `restore` ends: it restores θ exactly, and the estimator makes the update.

    The tables already have the masks.
    """

    def __init__(self, weights: Mover, active: Sequence[int] | None, unwritten: Unwritten, restore: Callable[[], None]):
        super().__init__(weights, active, unwritten, record=False)
        self._leave, self._restore = unwritten.leave, restore

    def to(self, offset: Mapping[Seed, float]) -> None:
        if offset:
            super().to(offset)
        else:
            self._leave()
            self._restore()
            at_once(self._noting({}))


class WalkFromAnchor:
    """Moves by overwriting the weights with anchor + offset; `restore` restores θ."""

    def __init__(
        self, weights: Weights, active: Sequence[int] | None, unwritten: Unwritten, restore: Callable[[], None]
    ):
        self._weights, self._active, self._unwritten, self._restore = weights, active, unwritten, restore
        self.moves = 0

    def to(self, offset: Mapping[Seed, float]) -> None:
        if offset:
            # Weights of dropped blocks are still at the anchor: no step since has changed them.
            moved = [partial(setattr, self, "moves", self.moves + 1)]
            self._weights.move(offset, active=self._active, from_anchor=True, then=moved)
        else:
            self._unwritten.leave()
            self._restore()

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        return self._unwritten.evaluate(closure)

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call]) -> None:
        raise AssertionError("an estimate at the anchor has no update of its own")


class Guard(TorchDispatchMode):
    """Raises Refused before an operation writes to one of the weights.

    Args:
        weights: plain tensors, none overlapping.
        names: their names, for the message.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Sequence[Tensor], names: Sequence[str]):
        super().__init__()
        self._spans, self._names = Spans(weights), names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for at, name in written(func):
            for t in tensors_in(args[at] if at < len(args) else kwargs.get(name)):
                self._check(t, func)
        return func(*args, **kwargs)

    def _check(self, t: Tensor, func: Any) -> None:
        if type(t) not in _PLAIN or t.layout != torch.strided or t.is_meta or not t.numel():
            return
        if (i := self._spans.find(t)) is not None:
            raise Refused(
                ValueError,
                f"it writes to {self._names[i]} ({func._schema.name}) while the weights are perturbed in place, "
                f"and they could not be restored; {_CURES}",
            )


class Unwritten:
    """Evaluates closures while weights are perturbed in place, and raises if a closure writes to them.

    A guarded evaluation stops the write before it happens. Every evaluation finds it afterwards, by PyTorch's version
    counters, and sets `weights.overwritten`.

    Args:
        weights: the weights that are moved.
        guarded: whether to check every operation. That takes some microseconds for each, and functions compiled by
            torch.compile run uncompiled.
    """

    def __init__(self, weights: Weights, guarded: bool):
        self._weights = weights
        self._guard: Guard | None = None
        if guarded and all(type(t) in _PLAIN for t in weights.theta):
            self._guard = Guard(weights.theta, [w.name for w in weights.weights])

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Return what the closure returns.

        Raises:
            Refused: the closure writes to a weight.
        """
        weights, before = self._weights, self._weights.versions()
        try:
            if self._guard is None:
                result = call(closure)
            else:
                with uncompiled(), self._guard:
                    result = call(closure)
        finally:
            if (now := weights.versions()) != before:
                weights.overwritten = True
        if now != before:
            counted = [w.name for w in weights.weights if not w.tensor.is_inference()]
            changed = [name for name, a, b in zip(counted, before, now, strict=True) if a != b]
            raise Refused(
                ValueError,
                f"it wrote to {', '.join(changed[:5])} while the weights were perturbed in place, and what was written "
                f"is mixed with the perturbation; {_CURES}",
            )
        return result

    def leave(self) -> None:
        """Remove the guard from PyTorch's stack of modes, in case an exception from outside left it there."""
        if self._guard is not None:
            remove_mode(self._guard)
