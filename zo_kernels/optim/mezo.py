"""MeZO: memory-efficient zeroth-order SGD (Malladi et al., arXiv 2305.17333)."""

from __future__ import annotations

from .base import ZeroOrderOptimizer


class MeZO(ZeroOrderOptimizer):
    """SPSA along one random direction a step, which is regenerated from a seed and never stored.

        g = (L(θ + ε z) - L(θ - ε z)) / 2ε,   z ~ N(0, I), or z_i = ±1 with distribution="rademacher"
        θ <- (1 - lr * weight_decay) θ - lr * g z

    Start with MeZO; the other methods change one thing about it. A step calls the closure twice, and needs no memory
    beyond that of inference. It updates the trained parameters in place.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333.

    Arguments, attributes, errors: `ZeroOrderOptimizer`. With `directions=n` a step averages n estimates.

        opt = zo_kernels.MeZO(model, lr=1e-6, eps=1e-3)
        loss = opt.step(lambda: F.cross_entropy(model(inputs), labels))
    """
