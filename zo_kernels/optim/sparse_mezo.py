"""Sparse-MeZO: MeZO on the small weights (Liu et al., arXiv 2402.15751)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import ZeroOrderOptimizer


class SparseMeZO(ZeroOrderOptimizer):
    """MeZO on the weights of small magnitude: large weights are neither perturbed nor updated.

        m_i = 1 where |θ_i| <= h, else 0
        g = (L(θ + ε (m . z)) - L(θ - ε (m . z))) / 2ε
        θ_i <- (1 - lr * weight_decay) θ_i - lr * g z_i   where m_i = 1;   θ_i stays where m_i = 0

    Each tensor has its own h: the exact percentile of its magnitudes at the first step, fixed for the run.

    *Which mask.* With `mask="redrawn"`, as published, each step takes m from the unperturbed weights of that moment; in
    place, m is kept as one bit a weight until the update. A weight that grows past h drops out for good, since nothing
    moves it any more: fewer and fewer take part. With `mask="kept"` the mask of the first step stays for the whole run,
    as one bit a weight: weights that were small at the start are trained, however large they grow. A parameter that is
    unfrozen later has the mask of its own first step. While updates are much smaller than weights, the two are alike.

    Fewer coordinates give less variance, so the learning rate may be higher. Use it when MeZO diverges at the learning
    rate that you want. It does not save time: a pass costs somewhat more than MeZO's.

    *Tensors that are left dense.* All weights of a tensor take part if no threshold separates its small weights from
    its large ones: if h = 0, or if many weights have the magnitude h, so that more than twice as many as intended would
    take part, or fewer than half as many as intended would be left alone. LoRA's B and new biases (zeros), new norms
    (ones), pruned and very coarsely quantised weights are such tensors. A mask would harm them: the weights that take
    part in the first step have another magnitude afterwards, so zeros, for example, would never move again. A warning
    names these tensors; with `strict=True` it is an error if they hold more than a hundredth of the masked weights. Put
    them into a group with `sparsity=0` to say that you mean it: such a group is dense without a warning.

    *Weights that change.* If you load other weights before the first step, the thresholds are computed again. After it
    they are fixed, also across `load_state_dict` and `resume`, and so are kept masks. Where masks are redrawn, the
    optimizer counts the weights below the thresholds at step 100, every 1000 steps, and after something else changed
    weights. It warns once if less than half or more than twice as many as intended take part, in tensors that hold more
    than a tenth of the weights that should.

    Source: Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    arXiv 2402.15751.

    Args:
        sparsity: the fraction of each tensor's weights that is left alone, in [0, 1). A group may have its own.
        mask: "redrawn" or "kept". It belongs to the run: that in a state or a trajectory replaces the optimizer's.

    Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(self, params: nn.Module | Iterable[Any], *, lr: float, sparsity: float = 0.75, **options: Any):
        super().__init__(params, lr=lr, sparsity=sparsity, **options)
