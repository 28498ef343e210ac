"""MeZO-SVRG: zeroth-order SGD with variance reduction (Gautam et al., arXiv 2404.08080)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..closures.losses import Closure
from ..estimators.svrg import SVRG
from ..estimators.svrg_schedule import ABOVE
from ..runs.attempt import attempted
from .base import ZeroOrderOptimizer, held_by


class MeZOSVRG(ZeroOrderOptimizer):
    """MeZO whose minibatch estimates are corrected by an estimate from a full batch at a snapshot, the anchor θ̄.

    With estimate(B, θ) = mean_k (L_B(θ + ε z_k) - L_B(θ - ε z_k)) / 2ε * z_k, every `anchor_every`-th step takes an
    anchor, from a full (or large) batch:

        θ̄ <- θ,   g = estimate(full, θ̄),   θ <- (1 - anchor_lr * weight_decay) θ - anchor_lr * g

    The steps between anchors use a minibatch I:

        θ <- (1 - lr * weight_decay) θ - lr * [estimate(I, θ) - estimate(I, θ̄) + g]

    No update changes the anchor. Between anchors θ is always written as the anchor plus a sum of directions, so passes
    in place leave no drift. Masks and dropped blocks are drawn with the anchor and stay until the next one, because
    the three estimates must lie in one subspace; masks with `mask="kept"` stay for the run.

    Use it when the noise of minibatches limits MeZO. A step between anchors calls the closure twice as often as MeZO's,
    and the anchor takes the memory of one copy of the trained weights.

    *Rates that fall.* With `anneal=5.0` all rates are divided by 5 whenever the loss at an anchor is more than
    `anneal_above` times that at the anchor before, from that anchor on. It compares the mean of the losses at θ̄ ± ε z_k
    on the full batch. The published code divides both rates by `--anneal` (5 in its example, 3 to 5 in its scripts for
    RoBERTa-large) when the mean training loss of an epoch is more than 1.05 times that of two epochs before, and not
    below 1e-5 for η₁ and 1e-6 for η₂; here there is no lower limit. Schedulers and groups keep the undivided rates; the
    trajectory has those that were used. If losses are on a GPU, a full-batch step with `anneal` waits for them.

    Source: Gautam et al., "Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models", arXiv 2404.08080.

    Args:
        lr: learning rate of the steps between anchors (η₂ in the paper).
        anchor_lr: learning rate of the full-batch steps (η₁). None: twice the group's `lr`, also while a scheduler
            changes `lr`. A number stays as it is. A group may have its own.
        anchor_every: steps from one anchor to the next (q), at least 1. The authors' scripts for RoBERTa-large take 2:
            every other step has the full batch.
        shared_direction: use the same z for the two minibatch estimates. False: draw them separately, as the published
            code does; their difference then keeps the variance of both.
        anneal: what the rates are divided by when the loss rises (α), more than 1; None to leave them as they are.
        anneal_above: how many times the last anchor's loss is too much (κ), at least 1.

    `annealed` is how often the rates have been divided so far. Other arguments, attributes, errors:
    `ZeroOrderOptimizer`.
    """

    anchor_lr: float | None = held_by("_estimator", "anchor_lr")
    anchor_every: int = held_by("_estimator", "anchor_every")
    shared_direction: bool = held_by("_estimator", "shared_direction")
    anneal: float | None = held_by("_estimator", "anneal", fixed=True)
    anneal_above: float = held_by("_estimator", "anneal_above", fixed=True)
    annealed: int = held_by("_estimator", "annealed", fixed=True)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        anchor_lr: float | None = None,
        anchor_every: int = 5,
        shared_direction: bool = True,
        anneal: float | None = None,
        anneal_above: float = ABOVE,
        **options: Any,
    ):
        estimator = SVRG(anchor_lr, anchor_every, shared_direction, anneal, anneal_above)
        super().__init__(params, lr=lr, _estimator=estimator, **options)

    @attempted
    def step(self, closure: Closure | None = None, full_closure: Closure | None = None) -> Any:
        """Take one step; every `anchor_every`-th one is a full-batch step, which takes an anchor.

        Args:
            closure: returns the loss on the step's minibatch; see `ZeroOrderOptimizer.step`. A step between anchors
                calls it 4 * directions times, a full-batch step does not call it.
            full_closure: returns the loss on the full (or a large) batch. A full-batch step calls it 2 * directions
                times, the others do not call it.

        Returns, Raises:
            As `ZeroOrderOptimizer.step`. Weights are restored exactly, from the anchor.
        """
        return self._take(closure=closure, full_closure=full_closure)
