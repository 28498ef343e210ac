"""Rejects updates that might make weights infinite, judged by eps, lr and g alone: no weight is read.

No |z| is above 6.56 (docs/noise.md, 3; of a sign it is 1), so a step of SPSA moves a weight w by at most
|decay - 1| |w| + 6.56 lr max|g|, and a step of MeZO-SVRG by three times the last term. With |decay| <= 1, and lr |g|
and eps within the limits below, a weight of at most half its dtype's maximum stays finite when it is perturbed and
updated: float16 reaches at most 0.5 + 3 * 0.103 of its 65504, the other dtypes far less of their 3.4e38. The limits are
the same for signs, so that a step is skipped or taken whatever the distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, dtype

from .. import checks
from ..trajectory.record import MAX_GRADIENT


@dataclass(frozen=True, slots=True)
class Reach:
    """The largest eps and lr |g| that weights of some dtypes stand."""

    limit: float
    what: str  # the weights in words, for messages

    @staticmethod
    def of(dtypes: Iterable[dtype]) -> Reach:
        """The limits of the dtype with the smallest range."""
        if torch.float16 in dtypes:
            return Reach(1024.0, "float16 weights")
        return Reach(1e30, "weights of float32's range")

    def check_eps(self, eps: float) -> None:
        """Raise ValueError if perturbed weights might overflow."""
        if not eps <= self.limit:
            raise ValueError(f"eps: expected at most {self.limit:g} for {self.what}, got {eps}")

    def largest_gradient(self, rates: Sequence[float] | Tensor) -> float | Tensor:
        """The largest |g| that a step with these learning rates may have."""
        if isinstance(rates, Tensor):
            return (self.limit / rates.max()).clamp(max=MAX_GRADIENT)
        rate = max(rates)
        return min(MAX_GRADIENT, self.limit / rate) if rate > 0.0 else MAX_GRADIENT

    def too_far(self, rates: Sequence[float], gradients: Iterable[float]) -> str:
        """The message for a step that is skipped because lr |g| is above the limit."""
        g = max(map(abs, gradients))
        return f"lr: expected lr * |g| of at most {self.limit:g} for {self.what}, got lr {max(rates)} and |g| {g:g}"


def unusable(rates: Sequence[float] | Tensor, decays: Sequence[float] | Tensor) -> str | None:
    """Why no step can be taken with these numbers, whatever its losses; None if one can. Does not wait for tensors."""
    if not isinstance(rates, Tensor) and not max(rates) <= checks.MAX_FLOAT32:
        return f"lr: expected a learning rate that float32 holds, got {max(rates)}"
    if not isinstance(decays, Tensor) and not min(decays) >= -1.0:
        return (
            "weight_decay: expected lr * weight_decay of at most 2, above which weights grow without end, got "
            f"{1.0 - min(decays):g}"
        )
    return None
