"""The protocol of a place: where the losses of a step are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..interrupts import Call
from ..weights.rows import Row, Seed


class Probes(Protocol):
    """Evaluations at θ + sum offset[seed] * z(seed), and the update that ends them.

    Whatever exception comes, and whenever: where the weights are is noted together with the pass that brought them
    there, so that `to({})` restores them. It may be called again and again.

    Attributes:
        moves: how often they went to another place; the way back to θ does not count.
    """

    moves: int

    def to(self, offset: Mapping[Seed, float]) -> None:
        """Go to θ + sum offset[seed] * z(seed); an empty offset is θ."""

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns there."""

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call]) -> None:
        """θ <- decay * θ + sum update[seed] * z(seed), for each row; with it the calls of `then`, or none of both."""


class Place(Protocol):
    """Evaluates losses at perturbed weights, for as long as one set of tables is valid.

    Attributes:
        name: "in_place" or "in_forward", as a trajectory records it.
    """

    name: str

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
        """For the evaluations of one step.

        Args:
            active: indices of the weights that are perturbed; None for all.
            seed: of the run.
            step: steps taken before.
            guarded: refuse writes to weights before they happen, where the weights move.
            from_anchor: perturb the anchor instead of θ.
            restore: brings θ back exactly; None if only a pass back can.
        """

    def restore(self) -> None:
        """Leave nothing behind of an evaluation that was cut short."""

    def is_still(self) -> bool:
        """Whether the weights are θ, and no evaluation is under way."""

    def writes(self) -> tuple[set[int], bool]:
        """Weights that closures wrote to since this was last asked, by index, and whether there were others."""

    def unperturbed(self) -> AbstractContextManager[None]:
        """For forwards between steps."""

    def memory_in_use(self) -> list[Any]:
        """What passes read and write besides the weights: a captured graph keeps it alive."""
