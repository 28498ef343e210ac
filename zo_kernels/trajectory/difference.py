"""Which two losses give the projected gradient of a direction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """The two losses whose difference gives the projected gradient g of a direction z.

    Attributes:
        name: "two_sided", L(θ + εz) - L(θ - εz); or "one_sided", L(θ + εz) - L(θ).
        losses, formula: for messages: the two losses, and g.
    """

    name: str
    losses: str
    formula: str

    @property
    def one_sided(self) -> bool:
        """Whether one of the losses is that at θ, which all directions share."""
        return self.name == "one_sided"

    def span(self, eps: float) -> float:
        """The distance along z between the two points, in units of z: g is the difference divided by it."""
        return eps if self.one_sided else 2 * eps

    def probes(self, directions: int) -> int:
        """How many times a step perturbs the weights."""
        return directions if self.one_sided else 2 * directions


TWO_SIDED = Difference("two_sided", "L+ and L-", "(L+ - L-) / 2 eps")
ONE_SIDED = Difference("one_sided", "its losses", "(L(θ + eps z) - L(θ)) / eps")
DIFFERENCES = {d.name: d for d in (TWO_SIDED, ONE_SIDED)}
