"""Where a step's losses are evaluated: weights that walk through θ ± εz and back, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from ..backends.types import Pass
from ..interrupts import Call, at_once
from ..weights.rows import Row, Seed, Value, minus
from ..weights.tables import Weights
from .writes import Unwritten


class Probes(Protocol):
    """Evaluations at θ + sum offset[seed] * z(seed), and the update that ends them.

    Whatever exception comes, and whenever: where the weights are is noted together with the pass that brought them
    there, so that `to({})` restores them. It may be called again and again.

    Attributes:
        moves: how many times they went to another place, restoring aside.
    """

    moves: int

    def to(self, offset: Mapping[Seed, float]) -> None:
        """Go to θ + sum offset[seed] * z(seed); an empty offset is θ."""

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns there."""

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call]) -> None:
        """θ <- decay * θ + sum update[seed] * z(seed), for each row; with it the calls of `then`, or none of both."""


class Mover(Protocol):
    """What `InPlace` needs of `Weights`; replaying puts a queue in their place."""

    def describe(
        self,
        deltas: Mapping[Any, Value | Row],
        decays: Row | None,
        active: Sequence[int] | None,
    ) -> Pass:
        """As `Weights.describe`."""

    def run(self, do: Pass, *, record: bool = False, then: Sequence[Call] = ()) -> None:
        """As `Weights.run`."""


class InPlace:
    """The weights themselves are moved. Every move is one pass, the update and the way back to θ together are one.

    Args:
        weights: what is moved.
        active: which of them, None for all.
        unwritten: evaluates closures; None where none are to be.
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


class RestoredInPlace(InPlace):
    """As `InPlace`, but `restore` brings θ back exactly, and the update is made elsewhere.

    Masks are those that the weights' tables keep.
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


class InPlaceFromAnchor:
    """The weights are overwritten by anchor + offset, each time anew; `restore` brings θ back."""

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
