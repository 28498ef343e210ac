"""LeZO: MeZO on some of the transformer blocks (Wang et al., arXiv 2410.09823)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import ZeroOrderOptimizer


class LeZO(ZeroOrderOptimizer):
    """MeZO that leaves a random subset of the transformer blocks alone in each step.

        g = (L(θ + ε (m . z)) - L(θ - ε (m . z))) / 2ε
        θ_i <- (1 - lr * weight_decay) θ_i - lr * g z_i   where m_i = 1;   θ_i stays where m_i = 0

    m is 0 in round(drop * N) of the N blocks, never in all of them, and each step draws these blocks again. Parameters
    outside the blocks (embeddings, final norm, head) always take part.

    A dropped block is neither perturbed nor updated, so a step's passes take less time; its forwards run in full. Use
    LeZO where passes are a large part of a step: with small batches, or where passes are slow.

    Source: Wang et al., "Simultaneous Computation and Memory Efficient Zeroth-Order Optimizer for Fine-Tuning Large
    Language Models", arXiv 2410.09823. The paper's sparsity ρ is `drop`.

    Args:
        drop: the fraction of the blocks that each step leaves alone, in [0, 1).
        blocks: the transformer blocks; None to find them in the module.

    Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(self, params: nn.Module | Iterable[Any], *, lr: float, drop: float = 0.75, **options: Any):
        super().__init__(params, lr=lr, drop=drop, **options)
