"""MeZO-SVRG: zeroth-order SGD with variance reduction (Gautam et al., arXiv 2404.08080)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..closures.losses import Closure
from ..estimators.svrg import SVRG
from ..runs.attempt import attempted
from .base import ZeroOrderOptimizer, held_by


class MeZOSVRG(ZeroOrderOptimizer):
    """SPSA with a control variate from a snapshot (the anchor θ̄).

    Every `anchor_every` steps, from a full (or large) batch,

        θ̄ <- θ,   g = estimate(full, θ̄),   θ <- (1 - anchor_lr * weight_decay) θ - anchor_lr * g

    and in the steps between, from a minibatch I,

        θ <- (1 - lr * weight_decay) θ - lr * [estimate(I, θ) - estimate(I, θ̄) + g]

    where estimate(B, θ) = mean_k (L_B(θ + ε z_k) - L_B(θ - ε z_k)) / 2ε * z_k. The anchor is a copy that no update
    changes; between anchors θ is always written as anchor + sum of directions, so passes in place leave no drift.
    Masks and dropped blocks are drawn with the anchor and kept until the next: the three estimates must live in one
    subspace.

    Source: Gautam et al., "Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models", arXiv 2404.08080.

    Args:
        lr: η₂, the rate of the steps between anchors.
        anchor_lr: η₁, the rate of the full-batch steps. None is twice the `lr` of the group, also while a scheduler
            changes that.
        anchor_every: steps from one anchor to the next (q).
        shared_direction: use the same z for the two minibatch estimates. False draws them apart, as the published code
            does; their difference then keeps the variance of both.

    `anchor_lr` may be given for each group; where it is a number, schedulers change `lr` alone. One copy of the
    weights is kept. Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    anchor_lr: float | None = held_by("_estimator", "anchor_lr")
    anchor_every: int = held_by("_estimator", "anchor_every")
    shared_direction: bool = held_by("_estimator", "shared_direction")

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        anchor_lr: float | None = None,
        anchor_every: int = 5,
        shared_direction: bool = True,
        **options: Any,
    ):
        super().__init__(params, lr=lr, estimator=SVRG(anchor_lr, anchor_every, shared_direction), **options)

    @attempted
    def step(self, closure: Closure | None = None, full_closure: Closure | None = None) -> Any:
        """Take one step; every `anchor_every`-th is a full-batch step.

        Args:
            closure: the loss on the step's minibatch; see `ZeroOrderOptimizer.step`. Called 4 * directions times
                between anchors, not at all in an anchor's step.
            full_closure: the loss on the whole (or a large) batch. Called 2 * directions times in an anchor's step.

        Returns, Raises:
            As `ZeroOrderOptimizer.step`. Weights are restored exactly, from the anchor.
        """
        return self._take(closure=closure, full_closure=full_closure)
