"""The numbers between the losses of a step and its update: Python floats, or float64 tensors where the losses are on a
GPU, so that nobody waits for it. The operations and their order are the same, hence the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, device

from ..backends.transfer import on_device
from ..trajectory.record import MAX_GRADIENT, projected_gradients
from .overflow import Reach, unusable

Value = float | Tensor  # a tensor is a float64 scalar
Row = Sequence[float] | Tensor  # one for each row of scales and decays; a tensor is float64 (rows,)
Pair = tuple[Value, Value]
Seed = int | Tensor  # a tensor is an int64 scalar, the bits of uint64


def vector(values: Row, where: device) -> Tensor:
    """As a tensor, which nobody may write to."""
    return values if isinstance(values, Tensor) else on_device(values, torch.float64, where)


def device_of(*values: object) -> device | None:
    """Where the tensors among them are; None if there are none."""
    return next((v.device for v in values if isinstance(v, Tensor)), None)


def on_host(row: Row) -> list[float]:
    """As numbers; this waits for the device."""
    return row.tolist() if isinstance(row, Tensor) else list(row)


def times(a: Row, b: Row) -> Row:
    """a * b."""
    if (where := device_of(a, b)) is not None:
        return vector(a, where) * vector(b, where)
    return [x * y for x, y in zip(a, b, strict=True)]


def minus(a: Row, b: Row, factor: Value) -> Row:
    """a - b * factor."""
    if (where := device_of(a, b, factor)) is not None:
        return vector(a, where) - vector(b, where) * factor
    assert not isinstance(factor, Tensor)
    return [x - y * factor for x, y in zip(a, b, strict=True)]


def divided(value: Value, n: int) -> Value:
    """value / n."""
    # PyTorch would multiply by the reciprocal of a number.
    return value / vector([n], value.device)[0] if isinstance(value, Tensor) else value / n


@dataclass(frozen=True, slots=True)
class Numbers:
    """What an update is made of. If it is refused, they are such that it changes nothing.

    Attributes:
        gradients: projected gradients of each estimate.
        rates, decays: for each row.
        ok: whether the losses are finite, their differences not too large for float32, and the update not for the
            weights.
        losses: where they are on a device, all of them, or NaN if the step is refused, which a record of it tells then.
        refusal: why the update is refused, if it is not the losses' fault and is known without waiting for a device.
    """

    gradients: list[list[Value]]
    rates: Row
    decays: Row
    ok: bool | Tensor
    losses: Tensor | None = None
    refusal: str | None = None

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
        """
        values = [value for pairs in estimates for pair in pairs for value in pair]
        where = device_of(*values, ok, *others)
        refusal = None if reach is None else unusable(rates, decays)
        most = MAX_GRADIENT if reach is None else reach.largest_gradient(rates)
        if where is None or refusal is not None:
            if refusal is None:
                assert not isinstance(rates, Tensor)
                known: Any = others
                gradients = [projected_gradients(pairs, eps) for pairs in estimates]
                flat_gradients = [g for each in gradients for g in each] + [g * len(known) for g in known]
                if ok and all(abs(g) <= most for g in flat_gradients):
                    return Numbers([list(each) for each in gradients], rates, decays, True)
                refusal = reach.too_far(rates, flat_gradients) if ok and reach is not None else None
            rows = len(rates)
            nothing = [[0.0] * len(each) for each in estimates]
            return Numbers([list[Value](each) for each in nothing], [0.0] * rows, [1.0] * rows, False, None, refusal)
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


def stacked(values: Sequence[Value], where: device) -> Tensor:
    """float64 (values,)."""
    return torch.stack(
        [v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=where) for v in values]
    )


def spsa_update(seeds: Sequence[Seed], gradients: Sequence[Value], rates: Row) -> dict[Seed, Row]:
    """seed -> -lr * g / n for each row."""
    n = len(seeds)
    if (where := device_of(*gradients, rates)) is not None:
        negative: Any = -vector(rates, where)
        return {s: negative * g / vector([n], where) for s, g in zip(seeds, gradients, strict=True)}
    numbers: Any = gradients
    return {s: [-lr * g / n for lr in rates] for s, g in zip(seeds, numbers, strict=True)}
