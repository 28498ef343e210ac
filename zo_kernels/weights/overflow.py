"""How far a step may go: an update that might make weights infinite is refused, which the numbers of it tell alone.

No |z| is above 6.56 (docs/noise.md, 3), so a step of SPSA moves a weight w by at most |decay - 1| |w| + 6.56 lr max|g|,
and one of MeZO-SVRG by three times the last term. With |decay| <= 1, and lr |g| and eps within the limits below, a
weight of at most half of what its dtype holds stays finite, perturbed and updated: 0.5 + 3 * 0.103 of float16's 65504,
and far less of the others' 3.4e38. Weights are not looked at.
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
    """What eps and lr |g| may be at most, for weights of some dtypes."""

    limit: float
    told: str  # of which weights

    @staticmethod
    def of(dtypes: Iterable[dtype]) -> Reach:
        """Of the narrowest of them."""
        if torch.float16 in dtypes:
            return Reach(1024.0, "float16 weights")
        return Reach(1e30, "weights of float32's range")

    def check_eps(self, eps: float) -> None:
        """Raise ValueError if perturbed weights might overflow."""
        if not eps <= self.limit:
            raise ValueError(f"eps: expected at most {self.limit:g} for {self.told}, got {eps}")

    def largest_gradient(self, rates: Sequence[float] | Tensor) -> float | Tensor:
        """The largest |g| that a step with these rates may have."""
        if isinstance(rates, Tensor):
            return (self.limit / rates.max()).clamp(max=MAX_GRADIENT)
        rate = max(rates)
        return min(MAX_GRADIENT, self.limit / rate) if rate > 0.0 else MAX_GRADIENT

    def too_far(self, rates: Sequence[float], gradients: Iterable[float]) -> str:
        """Why a step of these numbers is refused."""
        g = max(map(abs, gradients))
        return f"lr: expected lr * |g| of at most {self.limit:g} for {self.told}, got lr {max(rates)} and |g| {g:g}"


def unusable(rates: Sequence[float] | Tensor, decays: Sequence[float] | Tensor) -> str | None:
    """Why no step can be taken with these, whatever its losses, or None. Tensors are not waited for."""
    if not isinstance(rates, Tensor) and not max(rates) <= checks.MAX_FLOAT32:
        return f"lr: expected a learning rate that float32 holds, got {max(rates)}"
    if not isinstance(decays, Tensor) and not min(decays) >= -1.0:
        return (
            "weight_decay: expected lr * weight_decay of at most 2, since weights grow without end by more, got "
            f"{1.0 - min(decays):g}"
        )
    return None
