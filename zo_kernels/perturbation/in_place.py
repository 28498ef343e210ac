"""Perturbation in place: the weights walk through θ ± εz and back.

What is restored after a closure is not what the closure wrote to a weight meanwhile, so writes are refused.
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
        """Nothing is left behind: probes restore what they moved."""

    def is_still(self) -> bool:
        return False

    def writes(self) -> tuple[set[int], bool]:
        return set(), False

    def unperturbed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def memory_in_use(self) -> list[Any]:
        return []


class Mover(Protocol):
    """What `Walk` needs of `Weights`; a replay puts a queue in their place."""

    def describe(
        self,
        deltas: Mapping[Any, Value | Row],
        decays: Row | None,
        active: Sequence[int] | None,
    ) -> Pass:
        """As `Weights.describe`."""

    def run(self, do: Pass, *, record: bool = False, then: Sequence[Call] = ()) -> None:
        """As `Weights.run`."""


class Walk:
    """Moves the weights themselves. Every move is one pass; the way back to θ and the update together are one.

    Args:
        weights: what is moved.
        active: which of them, None for all.
        unwritten: evaluates closures; None where no losses are evaluated.
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
        there = self._at(offset)
        if deltas:
            do = self._weights.describe(deltas, None, self._active)
            self._weights.run(do, record=self._record, then=[*there, partial(setattr, self, "_record", False)])
        else:
            at_once(there)

    def _at(self, offset: Mapping[Seed, float]) -> list[Call]:
        """What notes that the weights are there."""
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
        self._weights.run(self._weights.describe(deltas, decays, self._active), then=[*self._at({}), *then])


class RestoredWalk(Walk):
    """As `Walk`, but `restore` brings θ back exactly, and the update is made elsewhere. Masks are those that the tables
    keep already.
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
            at_once(self._at({}))


class WalkFromAnchor:
    """Each move overwrites the weights by anchor + offset; `restore` brings θ back."""

    def __init__(
        self, weights: Weights, active: Sequence[int] | None, unwritten: Unwritten, restore: Callable[[], None]
    ):
        self._weights, self._active, self._unwritten, self._restore = weights, active, unwritten, restore
        self.moves = 0

    def to(self, offset: Mapping[Seed, float]) -> None:
        if offset:
            # Weights of dropped blocks are at the anchor already: no step since has changed them.
            moved = [partial(setattr, self, "moves", self.moves + 1)]
            self._weights.move(offset, active=self._active, from_anchor=True, then=moved)
        else:
            self._unwritten.leave()
            self._restore()

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        return self._unwritten.evaluate(closure)

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call]) -> None:
        raise AssertionError("the estimate at an anchor is not followed by an update of its own")


class Guard(TorchDispatchMode):
    """Raises Refused before an operation writes to one of the weights.

    Args:
        weights: plain tensors, none overlapping.
        names: of them.
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
    """Evaluates closures while weights are moved in place, and sees to it that nobody else writes to them meanwhile.

    In evaluations that are `guarded`, what would write is refused before it does. In all of them a write is seen
    afterwards, by PyTorch's counts of the changes of tensors, and `weights.overwritten` says so.

    Args:
        weights: what is moved.
        guarded: whether to look at every operation. That takes some microseconds for each, and what torch.compile has
            compiled runs uncompiled.
    """

    def __init__(self, weights: Weights, guarded: bool):
        self._weights = weights
        self._guard: Guard | None = None
        if guarded and all(type(t) in _PLAIN for t in weights.theta):
            self._guard = Guard(weights.theta, [w.name for w in weights.weights])

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns.

        Raises:
            Refused: it writes to a weight.
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
        """After an exception from outside: off PyTorch's stack of modes, should it have left the guard there."""
        if self._guard is not None:
            remove_mode(self._guard)
