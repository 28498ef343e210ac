"""Numbers that a pass takes: Python floats, or float64 tensors where the losses are on a GPU, so that nobody waits for
it. The operations and their order are the same, hence the bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, device

from ..backends.transfer import on_device

Value = float | Tensor  # a tensor is a float64 scalar
Row = Sequence[float] | Tensor  # one for each row of scales and decays; a tensor is float64 (rows,)
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


def stacked(values: Sequence[Value], where: device) -> Tensor:
    """float64 (values,)."""
    return torch.stack(
        [v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=where) for v in values]
    )


def decay_factors(rates: Sequence[float], weight_decays: Sequence[float]) -> list[float]:
    """The factor of the old weights for each row: 1 - lr * weight_decay."""
    return [1.0 - lr * w for lr, w in zip(rates, weight_decays, strict=True)]
