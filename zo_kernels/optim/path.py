"""MeZO-SVRG's way from its anchor: θ as the anchor plus a sum of directions, so that rounding does not add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .numbers import Row, Value, divided, minus, times
from .weights import Weights


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

    def start(self, seeds: Sequence[int], gradients: Sequence[Value]) -> dict[int, Value]:
        """Keep the anchor's estimate, which is also that of the step at the anchor, and return it."""
        self.gradients = {s: divided(g, len(seeds)) for s, g in zip(seeds, gradients, strict=True)}
        return self.gradients

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

    def advance(self, estimate: dict[int, Value], rates: Row, decays: Row) -> None:
        """θ <- decay * θ - rate * sum estimate[seed] * z(seed)."""
        self.decays = times(self.decays, decays)
        for seed, row in self.coefficients.items():
            self.coefficients[seed] = times(row, decays)
        for seed, g in estimate.items():
            self.coefficients[seed] = minus(self.coefficients.get(seed, [0.0] * self.rows), rates, g)

    def write(self, weights: Weights, active: Sequence[int] | None, *, record: bool = False) -> None:
        """Write θ to the active weights, and with `record` keep their masks."""
        if self.coefficients:
            weights.move(self.coefficients, decays=self.decays, active=active, record=record, from_anchor=True)
            return
        assert weights.anchors is not None
        for w, anchor in zip(weights.weights, weights.anchors, strict=True):
            w.tensor.copy_(anchor)


def _longer(row: Row, n: int, value: float) -> Row:
    if isinstance(row, Tensor):
        return torch.cat([row, row.new_full((n - len(row),), value)])
    return [*row, *[value] * (n - len(row))]
