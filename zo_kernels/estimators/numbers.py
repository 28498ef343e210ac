"""Computes the numbers of an update from the losses of a step."""

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
from .normalize import Normalizer

NOT_NORMALIZED = Normalizer()


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of an update. If the device skips the step, they are such that the update changes nothing.

    Attributes:
        gradients: the projected gradients of each estimate.
        along: the coefficients of the first estimate's directions, before the learning rate: its projected gradients,
            divided by what they are normalized by.
        normalizer: for the next step.
        rates, decays: one for each row of a pass.
        ok: False if the step is skipped: a loss is not finite, a difference of losses is too large for float32, or the
            update is too large for the weights.
        losses: if the losses are on a device, all of them; NaN if the step is skipped, so that its record shows it.
    """

    gradients: list[list[Value]]
    rates: Row
    decays: Row
    ok: bool | Tensor
    along: list[Value]
    normalizer: Normalizer
    losses: Tensor | None = None

    @staticmethod
    def of(
        estimates: Sequence[Sequence[Pair]],
        span: float,
        rates: Row,
        decays: Row,
        ok: bool | Tensor = True,
        *,
        reach: Reach | None = None,
        others: Sequence[Value] = (),
        normalizer: Normalizer = NOT_NORMALIZED,
    ) -> Numbers:
        """Compute the numbers from the two losses of each direction of each estimate.

        Args:
            span: of the two losses; see `Difference`.
            ok: False to skip the step in any case.
            reach: the limits of the weights; None in a replay, where the record says which steps were skipped.
            others: coefficients of an earlier estimate that the update adds.
            normalizer: divides the projected gradients of the first estimate.

        Raises:
            Refused: the update might make weights infinite. Losses on a device are not waited for: `ok` shows it there.
        """
        values = [value for pairs in estimates for pair in pairs for value in pair]
        where = device_of(*values, ok, *others, normalizer.square)
        if reach is not None and (why := unusable(rates, decays)) is not None:
            raise Refused(OutOfRange, why, of="")
        most = MAX_GRADIENT if reach is None else reach.largest_gradient(rates)
        if where is None:
            assert not isinstance(rates, Tensor)
            known: Any = others
            gradients: list[Any] = [projected_gradients(pairs, span) for pairs in estimates]
            along, after = gradients[0], normalizer
            if all(abs(g) <= MAX_GRADIENT for g in along):
                along, after = normalizer.divided(along)
            coefficients = [g for each in (along, *gradients[1:]) for g in each] + [g * len(known) for g in known]
            if ok and all(abs(g) <= most for g in coefficients):
                return Numbers([list(each) for each in gradients], rates, decays, True, along, after)
            if ok and reach is not None:
                raise Refused(OutOfRange, reach.too_far(rates, coefficients), of="")
            rows, nothing = len(rates), [list[Value]([0.0] * len(each)) for each in estimates]
            return Numbers(nothing, [0.0] * rows, [1.0] * rows, False, nothing[0], normalizer)
        losses = stacked(values, where)
        pairs_of_losses = losses.view(-1, 2)
        g = (pairs_of_losses[:, 0] - pairs_of_losses[:, 1]) / vector([span], where)
        after = normalizer
        if normalizer.kind == "none":
            fine = (g.abs() <= most).all() & ok
            g = c = torch.where(fine, g, 0.0)
        else:
            fine = (g.abs() <= MAX_GRADIENT).all() & ok
            along, after = normalizer.divided(torch.where(fine, g, 0.0).unbind())
            c = stacked(along, where)
            fine = fine & (c.abs() <= most).all()
            g, c, after = torch.where(fine, g, 0.0), torch.where(fine, c, 0.0), after.unless(fine, normalizer)
        if others and reach is not None:
            fine = fine & (stacked(others, where).abs() <= most / len(others)).all()
        flat: list[Value] = list(g.unbind())
        split = [[flat.pop(0) for _ in pairs] for pairs in estimates]
        if isinstance(decays, Tensor) or any(d != 1.0 for d in decays):
            decays = torch.where(fine, vector(decays, where), 1.0)
        return Numbers(
            split,
            torch.where(fine, vector(rates, where), 0.0),
            decays,
            fine,
            split[0] if c is g else [*c.unbind()],
            after,
            torch.where(fine, losses, float("nan")),
        )


def spsa_update(seeds: Sequence[Seed], along: Sequence[Value], rates: Row) -> dict[Seed, Row]:
    """Return the update of SPSA: seed -> -lr * g / n for each row, where `Numbers.along` has each g."""
    n = len(seeds)
    if (where := device_of(*along, rates)) is not None:
        negative: Any = -vector(rates, where)
        return {s: negative * g / vector([n], where) for s, g in zip(seeds, along, strict=True)}
    numbers: Any = along
    return {s: [-lr * g / n for lr in rates] for s, g in zip(seeds, numbers, strict=True)}
