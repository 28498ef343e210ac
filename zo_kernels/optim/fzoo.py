"""FZOO: one-sided estimates, and steps of a length that does not depend on the loss (Dang et al., arXiv 2506.09034)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .base import ZeroOrderOptimizer


class FZOO(ZeroOrderOptimizer):
    """One-sided estimates along several directions of random signs, divided by the deviation of their losses.

        l_0 = L(θ),   l_k = L(θ + ε u_k),   u_k of random signs, k = 1 ... n
        σ² = sum_k (l_k - mean l)² / (n - 1)
        θ <- (1 - lr * weight_decay) θ - lr / (n σ) * sum_k (l_k - l_0) u_k

    With g_k = (l_k - l_0) / ε that is -lr / (n D) sum_k g_k u_k, where D = σ / ε is the standard deviation of the g_k.
    A step takes n + 1 forwards, half of what two-sided estimates along n directions take, and in place n + 1 passes.
    Its length does not depend on the scale of the loss: it moves a weight by about lr / √n. So `lr` is in units of the
    weights, and a good one is far from one for MeZO.

    l_0 belongs to this step's batch, and the next step evaluates its own: a loss of another batch, or from before the
    update, would make every l_k - l_0 wrong by the same amount. If the l_k do not tell the directions apart, D being
    below a thousandth of the largest |g_k|, the step only decays the weights.

    Source: Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale
    Speed", arXiv 2506.09034.

    Args:
        directions: n, at least 2. With fewer than five or so, D is now and then far too small, and the step far too
            long: 1/D has no variance for n = 2 and 3. MeZO's `normalize="rms"` has no such tail.
        distribution: of u_k; "normal" for normals instead of signs.

    Other arguments, attributes, errors: `ZeroOrderOptimizer`. `step` returns l_0.

        opt = zo_kernels.FZOO(model, lr=5e-3, eps=1e-3)
        loss = opt.step(lambda: F.cross_entropy(model(inputs), labels))
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        directions: int = 8,
        distribution: str = "rademacher",
        **options: Any,
    ):
        own: dict[str, Any] = {"estimator": "one_sided", "normalize": "std"}
        if taken := own.keys() & options.keys():
            name = min(taken)
            raise ValueError(f"{name}: FZOO is {own[name]!r}, got {options[name]!r}; leave it out, or use MeZO with it")
        options |= {"distribution": distribution, **own}
        super().__init__(params, lr=lr, directions=directions, **options)
