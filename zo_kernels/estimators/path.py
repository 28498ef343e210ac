"""MeZO-SVRG's way from its anchor: θ as the anchor plus a sum of directions, so that rounding does not add up."""

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
    """θ = decays[row] * anchor + sum coefficients[seed][row] * z(seed).

    Attributes:
        gradients: the estimate at the anchor, as seed -> coefficient; every step until the next anchor adds it.
        ok: False if the estimate at the anchor was refused, and with it all steps until the next.
    """

    rows: int
    decays: Row = field(default_factory=list)
    coefficients: dict[int, Row] = field(default_factory=dict)
    gradients: dict[int, Value] = field(default_factory=dict)
    ok: bool | Tensor = True

    def __post_init__(self) -> None:
        self.extend(self.rows)

    def extend(self, rows: int) -> None:
        """To more rows: groups that were added later, and are at the anchor still."""
        self.rows = rows
        self.decays = _longer(self.decays, rows, 1.0)
        self.coefficients = {seed: _longer(row, rows, 0.0) for seed, row in self.coefficients.items()}

    @classmethod
    def started(cls, rows: int, seeds: Sequence[int], numbers: Numbers) -> Path:
        """With the step at the anchor, of the anchor's estimate."""
        gradients = {s: divided(g, len(seeds)) for s, g in zip(seeds, numbers.gradients[0], strict=True)}
        return cls(rows, gradients=gradients, ok=numbers.ok).advanced(gradients, numbers)

    def estimate(
        self, seeds: Sequence[int], here: Sequence[Value], anchor_seeds: Sequence[int], there: Sequence[Value]
    ) -> dict[int, Value]:
        """Of a step between anchors: estimate at θ - estimate at the anchor + the anchor's own."""
        estimate = dict(self.gradients)
        for s, g in zip(seeds, here, strict=True):
            estimate[s] = estimate.get(s, 0.0) + divided(g, len(seeds))
        for s, g in zip(anchor_seeds, there, strict=True):
            estimate[s] = estimate.get(s, 0.0) - divided(g, len(seeds))
        return estimate

    def advanced(self, estimate: dict[int, Value], numbers: Numbers) -> Path:
        """A step further: θ <- decay * θ - rate * sum estimate[seed] * z(seed)."""
        decays, rates = numbers.decays, numbers.rates
        coefficients = {seed: times(row, decays) for seed, row in self.coefficients.items()}
        for seed, g in estimate.items():
            coefficients[seed] = minus(coefficients.get(seed, [0.0] * self.rows), rates, g)
        return Path(self.rows, times(self.decays, decays), coefficients, self.gradients, self.ok)

    def write(
        self, weights: Weights, active: Sequence[int] | None, *, record: bool = False, then: Sequence[Call] = ()
    ) -> None:
        """Write θ to the active weights, and with `record` keep their masks. `then` is as in `Weights.move`, for a path
        that has left the anchor.
        """
        if self.coefficients:
            weights.move(
                self.coefficients, decays=self.decays, active=active, record=record, from_anchor=True, then=then
            )
            return
        assert weights.anchors is not None
        for w, anchor in zip(weights.weights, weights.anchors, strict=True):
            w.tensor.copy_(anchor)


def _longer(row: Row, n: int, value: float) -> Row:
    if isinstance(row, Tensor):
        return torch.cat([row, row.new_full((n - len(row),), value)])
    return [*row, *[value] * (n - len(row))]
