"""MeZO-SVRG's way from its anchor: θ as the anchor plus a sum of directions, so that rounding does not add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .weights import Weights


@dataclass
class Path:
    """θ = decays[row] * anchor + sum coefficients[seed][row] * z(seed).

    Attributes:
        gradients: the estimate at the anchor, as seed -> coefficient; every step until the next anchor adds it.
    """

    rows: int
    decays: list[float] = field(default_factory=list)
    coefficients: dict[int, list[float]] = field(default_factory=dict)
    gradients: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.extend(self.rows)

    def extend(self, rows: int) -> None:
        """To more rows: groups that were added later, and are at the anchor still."""
        self.rows = rows
        self.decays += [1.0] * (rows - len(self.decays))
        for row in self.coefficients.values():
            row += [0.0] * (rows - len(row))

    def start(self, seeds: Sequence[int], gradients: Sequence[float]) -> dict[int, float]:
        """Keep the anchor's estimate, which is also that of the step at the anchor, and return it."""
        self.gradients = {s: g / len(seeds) for s, g in zip(seeds, gradients, strict=True)}
        return self.gradients

    def estimate(
        self, seeds: Sequence[int], here: Sequence[float], anchor_seeds: Sequence[int], there: Sequence[float]
    ) -> dict[int, float]:
        """Of a step between anchors: estimate at θ - estimate at the anchor + the anchor's own."""
        estimate = dict(self.gradients)
        for s, g in zip(seeds, here, strict=True):
            estimate[s] = estimate.get(s, 0.0) + g / len(seeds)
        for s, g in zip(anchor_seeds, there, strict=True):
            estimate[s] = estimate.get(s, 0.0) - g / len(seeds)
        return estimate

    def advance(self, estimate: dict[int, float], rates: Sequence[float], decays: Sequence[float]) -> None:
        """θ <- decay * θ - rate * sum estimate[seed] * z(seed)."""
        self.decays = [p * d for p, d in zip(self.decays, decays, strict=True)]
        for row in self.coefficients.values():
            row[:] = [c * d for c, d in zip(row, decays, strict=True)]
        for seed, g in estimate.items():
            row = self.coefficients.setdefault(seed, [0.0] * self.rows)
            row[:] = [c - lr * g for c, lr in zip(row, rates, strict=True)]

    def write(self, weights: Weights, active: Sequence[int] | None, *, record: bool = False) -> None:
        """Write θ to the active weights, and with `record` keep their masks."""
        if self.coefficients:
            weights.move(self.coefficients, decays=self.decays, active=active, record=record, from_anchor=True)
            return
        assert weights.anchors is not None
        for w, anchor in zip(weights.weights, weights.anchors, strict=True):
            w.tensor.copy_(anchor)
