"""SPSA: the difference of two losses along a random direction (Spall 1992; MeZO, arXiv 2305.17333)."""

from __future__ import annotations

from functools import partial

from ..trajectory import Kind
from ..weights.rows import decay_factors
from .numbers import Numbers, spsa_update
from .protocol import Estimate, Estimator, Step


class TwoSided(Estimator):
    """g_k = (L(θ + ε z_k) - L(θ - ε z_k)) / 2ε, and θ <- decay θ - lr / n sum_k g_k z_k: 2n forwards, 2n + 1 passes."""

    def estimate(self, step: Step) -> Estimate:
        (closure,), seeds = step.closures, step.draws.seeds()
        probes = step.probes(step.weights.active(step.draws.dropped()))
        losses = step.losses(probes, closure, seeds)
        decays = decay_factors(step.rates, step.weight_decays)
        numbers = Numbers.of([losses.pairs], step.eps, step.rates, decays, reach=step.weights.reach)
        update = spsa_update(seeds, numbers.gradients[0], numbers.rates)
        return Estimate(Kind.STEP, losses, numbers, partial(probes.finish, update, numbers.decays), step.rates)
