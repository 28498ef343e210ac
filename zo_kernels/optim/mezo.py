"""MeZO: memory-efficient zeroth-order SGD (Malladi et al., arXiv 2305.17333)."""

from __future__ import annotations

from .base import ZeroOrderOptimizer


class MeZO(ZeroOrderOptimizer):
    """θ <- (1 - lr * weight_decay) θ - lr * g z, g = (L(θ + ε z) - L(θ - ε z)) / 2ε, z ~ N(0, I) from a seed.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333.
    Arguments, attributes, errors: `ZeroOrderOptimizer`.
    """
