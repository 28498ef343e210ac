"""Sparse-MeZO (Liu et al., arXiv 2402.15751)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import ZeroOrderOptimizer


class SparseMeZO(ZeroOrderOptimizer):
    """MeZO on the small weights: m = (|θ| <= h), with θ <- θ - lr * g (m . z) and probes at θ ± ε (m . z).

    h is a percentile of each tensor's magnitudes, fixed when the optimizer is made; m is taken from the current,
    unperturbed weights in every step and kept as one bit a weight until the step's update.

    Source: Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    arXiv 2402.15751.

    Args:
        sparsity: the fraction of each tensor left alone.

    Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(self, params: nn.Module | Iterable[Any], *, lr: float, sparsity: float = 0.75, **options: Any):
        super().__init__(params, lr=lr, sparsity=sparsity, **options)
