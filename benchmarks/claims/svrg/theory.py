"""The variance of the estimates by the law of total variance, from the true gradients of the examples.

With z ~ N(0, I_d), E[z zᵀ] = I and E|z zᵀ a|² = (d + 2) |a|². Up to O(ε²) an estimate on a batch I is z zᵀ a_I, with
a_I the batch's gradient, a = E a_I, and S = E|a_I - a|². Split into what is left if the batch is full, and the rest,

    E|z zᵀ a_I - a|² = (d + 1) |a|²  [direction]  +  (d + 2) S  [minibatch]

MeZO has a_I = ∇f_I(θ). The correction of MeZO-SVRG with a shared z has a_I = ∇f_I(θ) - ∇f_I(θ̄), which is small near the
anchor; to it comes the anchor's own estimate, drawn once a period, with (d + 1) |∇f(θ̄)|². With separate z and z' the
correction is z zᵀ a_I - z' z'ᵀ b_I, b_I = ∇f_I(θ̄), and the two terms are independent given I:

    (d + 1) (|a|² + |b|²)  [direction]  +  (d + 2) (S_a + S_b) - 2 tr Cov(a_I, b_I)  [minibatch]

of which nothing cancels but a part in d + 2.

What a step is worth: with the best learning rate, SPSA lowers a loss of curvature L by |∇f|⁴ / (2 L E|estimate|²), and
E|estimate|² = (d + 2) (|∇f|² + S), so a step with the full batch is worth 1 + S / |∇f|² of MeZO's (`worth`). The
anchor's estimate has one z for the whole period, and the steps between anchors go along it again: near the anchor, a
period of MeZO-SVRG is one step with the full batch, in q steps and 2 n + 4 b (q - 1) example-forwards (`cost`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .problems import BATCH


@dataclass(frozen=True)
class Split:
    """A variance E|estimate - mean|² in its parts: that of a full batch, the minibatch's, and the anchor estimate's."""

    direction: float
    minibatch: float
    anchor: float = 0.0

    @property
    def total(self) -> float:
        return self.direction + self.minibatch + self.anchor


def covariance(a: Tensor, b: Tensor) -> float:
    """tr Cov of the means of a and b, (n, d), over a minibatch drawn without replacement."""
    n = len(a)
    scale = (n - BATCH) / (BATCH * (n - 1))
    return scale * ((a - a.mean(0)) * (b - b.mean(0))).sum(1).mean().item()


def mezo(here: Tensor) -> Split:
    """Of MeZO's estimate, from each example's gradient at θ, (n, d)."""
    d = here.shape[1]
    return Split((d + 1) * _square(here), (d + 2) * covariance(here, here))


def svrg(here: Tensor, there: Tensor, directions: str) -> Split:
    """Of MeZO-SVRG's estimate, from each example's gradient at θ and at the anchor, (n, d)."""
    d = here.shape[1]
    anchor = (d + 1) * _square(there)
    if directions == "shared":
        return Split((d + 1) * _square(here - there), (d + 2) * covariance(here - there, here - there), anchor)
    minibatch = (d + 2) * (covariance(here, here) + covariance(there, there)) - 2 * covariance(here, there)
    return Split((d + 1) * (_square(here) + _square(there)), minibatch, anchor)


def worth(here: Tensor) -> float:
    """How many steps of MeZO one with the full batch is worth."""
    return 1 + covariance(here, here) / _square(here)


def cost(examples: int, anchor_every: int) -> float:
    """How many steps of MeZO have as many example-forwards as a period of MeZO-SVRG."""
    return (2 * examples + 4 * BATCH * (anchor_every - 1)) / (2 * BATCH)


def _square(gradients: Tensor) -> float:
    """|mean|²."""
    return gradients.mean(0).square().sum().item()
