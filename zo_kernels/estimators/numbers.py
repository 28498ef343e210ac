"""The numbers between the losses of a step and its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..closures.losses import OutOfRange, Pair, Refused
from ..trajectory.record import MAX_GRADIENT, projected_gradients
from ..weights.overflow import Reach, unusable
from ..weights.rows import Row, Seed, Value, device_of, stacked, vector


@dataclass(frozen=True, slots=True)
class Numbers:
    """What an update is made of. If a step is refused on the device, the update changes nothing.

    Attributes:
        gradients: projected gradients of each estimate.
        rates, decays: for each row.
        ok: whether the losses are finite, their differences not too large for float32, and the update not for the
            weights.
        losses: where they are on a device, all of them, or NaN if the step is refused, so that its record tells.
    """

    gradients: list[list[Value]]
    rates: Row
    decays: Row
    ok: bool | Tensor
    losses: Tensor | None = None

    @staticmethod
    def of(
        estimates: Sequence[Sequence[Pair]],
        eps: float,
        rates: Row,
        decays: Row,
        ok: bool | Tensor = True,
        *,
        reach: Reach | None = None,
        others: Sequence[Value] = (),
    ) -> Numbers:
        """Of the losses (L+, L-) of each direction of each estimate.

        Args:
            ok: False to refuse it in any case.
            reach: of the weights; None in a replay, where the record tells what was refused.
            others: coefficients of an estimate that was made before, and that the update adds.

        Raises:
            Refused: the update might make weights infinite, as far as that is known without waiting for a device.
        """
        values = [value for pairs in estimates for pair in pairs for value in pair]
        where = device_of(*values, ok, *others)
        if reach is not None and (why := unusable(rates, decays)) is not None:
            raise Refused(OutOfRange, why, of="")
        most = MAX_GRADIENT if reach is None else reach.largest_gradient(rates)
        if where is None:
            assert not isinstance(rates, Tensor)
            known: Any = others
            gradients = [projected_gradients(pairs, eps) for pairs in estimates]
            flat_gradients = [g for each in gradients for g in each] + [g * len(known) for g in known]
            if ok and all(abs(g) <= most for g in flat_gradients):
                return Numbers([list(each) for each in gradients], rates, decays, True)
            if ok and reach is not None:
                raise Refused(OutOfRange, reach.too_far(rates, flat_gradients), of="")
            rows, nothing = len(rates), [list[Value]([0.0] * len(each)) for each in estimates]
            return Numbers(nothing, [0.0] * rows, [1.0] * rows, False)
        losses = stacked(values, where)
        pairs_of_losses = losses.view(-1, 2)
        g = (pairs_of_losses[:, 0] - pairs_of_losses[:, 1]) / vector([2 * eps], where)
        fine = (g.abs() <= most).all() & ok
        if others and reach is not None:
            fine = fine & (stacked(others, where).abs() <= most / len(others)).all()
        flat = list(torch.where(fine, g, 0.0).unbind())
        split = [[flat.pop(0) for _ in pairs] for pairs in estimates]
        if isinstance(decays, Tensor) or any(d != 1.0 for d in decays):
            decays = torch.where(fine, vector(decays, where), 1.0)
        return Numbers(
            [list[Value](each) for each in split],
            torch.where(fine, vector(rates, where), 0.0),
            decays,
            fine,
            torch.where(fine, losses, float("nan")),
        )


def spsa_update(seeds: Sequence[Seed], gradients: Sequence[Value], rates: Row) -> dict[Seed, Row]:
    """seed -> -lr * g / n for each row."""
    n = len(seeds)
    if (where := device_of(*gradients, rates)) is not None:
        negative: Any = -vector(rates, where)
        return {s: negative * g / vector([n], where) for s, g in zip(seeds, gradients, strict=True)}
    numbers: Any = gradients
    return {s: [-lr * g / n for lr in rates] for s, g in zip(seeds, numbers, strict=True)}
