"""Sparse-MeZO (Liu et al., arXiv 2402.15751)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import ZeroOrderOptimizer


class SparseMeZO(ZeroOrderOptimizer):
    """MeZO on the small weights: m = (|θ| <= h), with θ <- θ - lr * g (m . z) and probes at θ ± ε (m . z).

    h is a percentile of each tensor's magnitudes, taken of the weights as they are at the first step, and fixed from
    then on; m is taken from the current, unperturbed weights in every step and kept as one bit a weight until the
    step's update.

    *Ties.* A tensor is left dense, and a warning names it, if its percentile does not separate: if h = 0, or ties at h
    bring in more than twice as many weights as are to take part, or leave out fewer than half of those that are to be
    left out. So it is with LoRA's B and new biases (zeros), new norms (ones), pruned and very coarsely quantised
    weights. A mask that is taken anew in every step means nothing there: what takes part in the first step has another
    magnitude from then on, and zeros would never move again. A draw of which ties take part would have to be kept, a
    bit a weight for as long as the run lasts. Where only a hundredth of the weights is concerned, as with the bias of a
    new classifier, this is no error with strict=True. A group with sparsity=0 is dense without a word.

    *Other weights.* Weights that are loaded before the first step have thresholds of their own. Later the thresholds
    stay, those of a state or a trajectory that a run goes on from, too; but if weights are changed by others, and after
    100 steps and every 1000, the weights below them are counted, and it is said once if tensors with more than a tenth
    of those that are to take part have less than half or more than twice of their share.

    Source: Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    arXiv 2402.15751.

    Args:
        sparsity: the fraction of each tensor left alone.

    Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(self, params: nn.Module | Iterable[Any], *, lr: float, sparsity: float = 0.75, **options: Any):
        super().__init__(params, lr=lr, sparsity=sparsity, **options)
