"""θ as MeZO-SVRG's anchor plus a sum of directions. It is always written in one pass, so rounding does not add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..interrupts import Call
from ..weights.rows import Row, Value, divided, minus, times
from ..weights.tables import Weights
from .numbers import Numbers


@dataclass
class Path:
    """The path from the anchor to θ = decays[row] * anchor + sum coefficients[seed][row] * z(seed).

    Attributes:
        gradients: the full-batch estimate at the anchor, as seed -> coefficient; each step until the next anchor adds
            it.
        ok: False if the step that took the anchor was skipped; then all steps until the next anchor are skipped.
    """

    rows: int
    decays: Row = field(default_factory=list)
    coefficients: dict[int, Row] = field(default_factory=dict)
    gradients: dict[int, Value] = field(default_factory=dict)
    ok: bool | Tensor = True

    def __post_init__(self) -> None:
        self.extend(self.rows)

    def extend(self, rows: int) -> None:
        """Add rows for parameter groups that were added after the anchor: their weights are still at the anchor."""
        self.rows = rows
        self.decays = _extended(self.decays, rows, 1.0)
        self.coefficients = {seed: _extended(row, rows, 0.0) for seed, row in self.coefficients.items()}

    @classmethod
    def started(cls, rows: int, seeds: Sequence[int], numbers: Numbers) -> Path:
        """Return the path after the full-batch step, which follows the estimate at the anchor."""
        gradients = {s: divided(g, len(seeds)) for s, g in zip(seeds, numbers.gradients[0], strict=True)}
        return cls(rows, gradients=gradients, ok=numbers.ok).advanced(gradients, numbers)

    def estimate(
        self, seeds: Sequence[int], here: Sequence[Value], anchor_seeds: Sequence[int], there: Sequence[Value]
    ) -> dict[int, Value]:
        """Combine the estimates of a step between anchors: at θ - at the anchor + the anchor's full-batch estimate."""
        estimate = dict(self.gradients)
        for s, g in zip(seeds, here, strict=True):
            estimate[s] = estimate.get(s, 0.0) + divided(g, len(seeds))
        for s, g in zip(anchor_seeds, there, strict=True):
            estimate[s] = estimate.get(s, 0.0) - divided(g, len(seeds))
        return estimate

    def advanced(self, estimate: dict[int, Value], numbers: Numbers) -> Path:
        """Return the path after one more step: θ <- decay * θ - rate * sum estimate[seed] * z(seed)."""
        decays, rates = numbers.decays, numbers.rates
        coefficients = {seed: times(row, decays) for seed, row in self.coefficients.items()}
        for seed, g in estimate.items():
            coefficients[seed] = minus(coefficients.get(seed, [0.0] * self.rows), rates, g)
        return Path(self.rows, times(self.decays, decays), coefficients, self.gradients, self.ok)

    def write(
        self, weights: Weights, active: Sequence[int] | None, *, record: bool = False, then: Sequence[Call] = ()
    ) -> None:
        """Write θ to the active weights.

        Args:
            record: also take the masks from the anchor, and keep them.
            then: see `Weights.move`; only for a path that has left the anchor.
        """
        if self.coefficients:
            weights.move(
                self.coefficients, decays=self.decays, active=active, record=record, from_anchor=True, then=then
            )
            return
        assert weights.anchors is not None
        for w, anchor in zip(weights.weights, weights.anchors, strict=True):
            w.tensor.copy_(anchor)


def _extended(row: Row, n: int, value: float) -> Row:
    """Extend a row to n entries by a value."""
    if isinstance(row, Tensor):
        return torch.cat([row, row.new_full((n - len(row),), value)])
    return [*row, *[value] * (n - len(row))]
