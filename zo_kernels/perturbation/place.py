"""The protocols of a place, where the losses of a step are evaluated, and of its probes, which evaluate them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..interrupts import Call
from ..weights.rows import Row, Seed


class Probes(Protocol):
    """Evaluates losses at θ + sum offset[seed] * z(seed), and ends with the update.

    Each pass also notes where it moved the weights, in one chain of C functions. So after any exception `to({})`
    restores the weights; it can be called repeatedly.

    Attributes:
        moves: how often the probes moved away from θ or to another offset; moves back to θ do not count.
    """

    moves: int

    def to(self, offset: Mapping[Seed, float]) -> None:
        """Move to θ + sum offset[seed] * z(seed); an empty offset is θ."""

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Return what the closure returns at the current offset."""

    def finish(self, update: Mapping[Seed, Row], decays: Row, then: Sequence[Call]) -> None:
        """Update θ <- decay * θ + sum update[seed] * z(seed), for each row. The same pass makes the calls of `then`."""


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
        """Make probes for the evaluations of one step.

        Args:
            active: indices of the weights that are perturbed; None for all.
            seed: of the run.
            step: steps taken before.
            guarded: in place, stop a closure's write to weights before it happens.
            from_anchor: perturb the anchor instead of θ.
            restore: restores θ exactly; None if only a pass can move the weights back.
        """

    def restore(self) -> None:
        """Clean up after an evaluation that an exception ended."""

    def is_still(self) -> bool:
        """Say whether the weights are known to be θ, since this place never moves them and no evaluation runs."""

    def writes(self) -> tuple[set[int], bool]:
        """Return the indices of weights that closures wrote to since the last call, and whether there may be others."""

    def unperturbed(self) -> AbstractContextManager[None]:
        """Return a context in which forwards between steps run, without a perturbation."""

    def memory_in_use(self) -> list[Any]:
        """Return the memory that passes use besides the weights; a captured graph keeps it alive."""
