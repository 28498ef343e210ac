"""LeZO (Wang et al., arXiv 2410.09823)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import ZeroOrderOptimizer


class LeZO(ZeroOrderOptimizer):
    """MeZO on a random subset of the transformer blocks, drawn anew every step.

    round(drop * N) of N blocks (never all) are neither perturbed nor updated, and cost nothing. Parameters outside the
    blocks (embeddings, final norm, head) always take part.

    Source: Wang et al., "Simultaneous Computation and Memory Efficient Zeroth-Order Optimizer for Fine-Tuning Large
    Language Models", arXiv 2410.09823; its sparsity ρ is `drop`.

    Args:
        drop: the fraction of blocks left alone in a step.

    Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(self, params: nn.Module | Iterable[Any], *, lr: float, drop: float = 0.75, **options: Any):
        super().__init__(params, lr=lr, drop=drop, **options)
