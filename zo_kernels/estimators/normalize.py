"""What the learning rates of a step are divided by, so that its length does not depend on the scale of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, device

from .. import checks
from ..closures.resolution import LEAST_SPREAD
from ..trajectory.setups import NORMALIZE
from ..weights.rows import Value, device_of, divided, stacked, total


@dataclass(frozen=True, slots=True)
class RMS:
    """`normalize="rms"` with numbers of your own: an optimizer divides its learning rates by √v̂ + δ.

    v is an exponential mean of the steps' mean squared projected gradients, this step's included, and v̂ is v without
    its bias towards 0:

        v <- β v + (1 - β) mean_k g_k²,   w <- β w + (1 - β),   v̂ = v / w

    One scalar remembers the scale of the gradient. The idea is MEAZO's (arXiv 2605.03869), which squares the mean of
    the g_k; with one direction a step both are the same.

    Args:
        beta: β, in [0, 1). 0 divides each step by its own root mean square.
        delta: δ, in units of g, at least 0.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    beta: float = 0.99
    delta: float = 1e-8

    def __post_init__(self) -> None:
        checks.number("normalize: beta", self.beta, 0.0, 1.0, open_high=True)
        checks.number("normalize: delta", self.delta, 0.0, 1e30)


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Divides the projected gradients of a step by D. It never changes: each step makes the next one.

    Attributes:
        kind: "none": D = 1; "std": D is the standard deviation of the step's g_k, or 0 if it is below a thousandth of
            the largest; "rms": see `RMS`.
        rms: the numbers of "rms".
        square, weight: of "rms": v and w so far, floats or float64 scalars on the device of the losses.
    """

    kind: str = "none"
    rms: RMS = RMS()
    square: Value = 0.0
    weight: Value = 0.0

    @classmethod
    def of(cls, normalize: str | RMS) -> Normalizer:
        """Return that of an optimizer's option.

        Raises:
            TypeError, ValueError: it is neither a `RMS` nor one of NORMALIZE.
        """
        if isinstance(normalize, RMS):
            return cls("rms", normalize)
        if not isinstance(normalize, str):
            kinds = ", ".join(map(repr, NORMALIZE))
            raise TypeError(f"normalize: expected one of {kinds} or a zo_kernels.RMS, got {type(normalize).__name__}")
        return cls(checks.choice("normalize", normalize, NORMALIZE))

    @classmethod
    def of_setup(cls, kind: str, numbers: Sequence[float]) -> Normalizer:
        """Return that which a trajectory's setup has."""
        if kind != "rms":
            return cls(kind)
        beta, delta, square, weight = numbers
        return cls(kind, RMS(beta, delta), square, weight)

    @property
    def numbers(self) -> tuple[float, ...]:
        """What a setup and a state keep of it: nothing, or beta, delta, v and w. This waits for a device."""
        if self.kind != "rms":
            return ()
        return self.rms.beta, self.rms.delta, float(self.square), float(self.weight)

    def check_directions(self, directions: int) -> None:
        """Raise ValueError if a step has too few directions."""
        if self.kind == "std" and directions < 2:
            raise ValueError(
                f"directions: expected at least 2 with normalize='std', the standard deviation over a step's "
                f"directions, got {directions}; take more, or normalize='rms'"
            )

    def divided(self, gradients: Sequence[Value]) -> tuple[list[Value], Normalizer]:
        """Return g_k / D of each direction, 0 where D is 0, and the normalizer after this step."""
        if self.kind == "none":
            return list(gradients), self
        where, after = device_of(*gradients, self.square), self
        g: Any = list(gradients) if where is None else stacked(gradients, where)
        n = len(gradients)
        if self.kind == "std":
            shifted = _less(g, g[0])  # so that equal numbers have a mean of exactly 0, whatever n is
            d: Any = _root(divided(total(_squares(_less(shifted, divided(total(shifted), n)))), n - 1))
            # A division by less would only be a very long step. Of one-sided losses `closures.resolution` tells it.
            far = LEAST_SPREAD * (max(map(abs, g)) if where is None else g.abs().max())
            d = (d if d > far else 0.0) if where is None else torch.where(d > far, d, 0.0)
        else:
            beta = self.rms.beta
            square = beta * self.square + (1.0 - beta) * divided(total(_squares(g)), n)
            after = replace(self, square=square, weight=beta * self.weight + (1.0 - beta))
            d = _root(square / after.weight) + self.rms.delta
        if where is None:
            return [x / d if d > 0.0 else 0.0 for x in g], after
        return list(torch.where(d > 0.0, g / d, 0.0).unbind()), after

    def unless(self, fine: Tensor, before: Normalizer) -> Normalizer:
        """Return this one where a step is taken, else the one before it, without waiting for the device."""
        if self is before:
            return self
        return self.with_sums(torch.where(fine, self.sums(fine.device), before.sums(fine.device)))

    def sums(self, where: device) -> Tensor:
        """Return v and w as a new float64 tensor (2,)."""
        return stacked([self.square, self.weight], where)

    def with_sums(self, sums: Tensor) -> Normalizer:
        """Return this one with v and w read from a tensor (2,), also when it is written to later."""
        square, weight = sums.unbind()
        return replace(self, square=square, weight=weight) if self.kind == "rms" else self

    def kept(self) -> Normalizer:
        """Return this one with v and w in memory of their own."""
        where = device_of(self.square)
        return self if where is None else self.with_sums(self.sums(where))

    def same_kind(self, kind: str) -> str | None:
        """Say what was expected if another run has another kind of normalizer; None if it has this one."""
        return None if kind == self.kind else f"expected {self.kind!r}, as this optimizer has, got {kind!r}"


def checked_normalizer(given: Mapping[str, Any], own: Normalizer, at: str) -> Normalizer:
    """Return the normalizer of a state that is being loaded, which has "normalize" and "rms".

    Raises:
        TypeError, ValueError: it is not of the same kind as the optimizer's own, or a number is out of range.
    """
    kind = checks.choice(f"{at}normalize", given.get("normalize", "none"), NORMALIZE)
    if (wrong := own.same_kind(kind)) is not None:
        raise ValueError(f"{at}normalize: {wrong}; make the optimizer with normalize={kind!r}")
    if kind != "rms":
        return own
    numbers = checks.sequence(f"{at}rms", given.get("rms"), 4)
    limits = (("beta", 1.0), ("delta", 1e30), ("v", 1e60), ("weight", 1.0))
    return Normalizer.of_setup(
        kind, [checks.number(f"{at}rms: {name}", x, 0.0, high) for (name, high), x in zip(limits, numbers, strict=True)]
    )


def _less(values: Any, centre: Any) -> Any:
    return values - centre if isinstance(values, Tensor) else [x - centre for x in values]


def _squares(values: Any) -> Any:
    return values * values if isinstance(values, Tensor) else [x * x for x in values]


def _root(value: Value) -> Value:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)
