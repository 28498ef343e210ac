"""The numbers of a pass: Python floats or, if the losses are on a GPU, float64 tensors, so that the host never waits.

Both kinds use the same operations in the same order, so they give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, device

from ..backends.transfer import on_device

Value = float | Tensor  # a tensor is a float64 scalar
Row = Sequence[float] | Tensor  # one for each row of scales and decays; a tensor is float64 (rows,)
Seed = int | Tensor  # a tensor is an int64 scalar, the bits of uint64


def vector(values: Row, where: device) -> Tensor:
    """Return a row as a tensor on a device. Do not write to it."""
    return values if isinstance(values, Tensor) else on_device(values, torch.float64, where)


def device_of(*values: object) -> device | None:
    """Return the device of the tensors among the values; None if there are no tensors."""
    return next((v.device for v in values if isinstance(v, Tensor)), None)


def on_host(row: Row) -> list[float]:
    """Return a row as floats; this waits for the device."""
    return row.tolist() if isinstance(row, Tensor) else list(row)


def times(a: Row, b: Row) -> Row:
    """Return a * b."""
    if (where := device_of(a, b)) is not None:
        return vector(a, where) * vector(b, where)
    return [x * y for x, y in zip(a, b, strict=True)]


def minus(a: Row, b: Row, factor: Value) -> Row:
    """Return a - b * factor."""
    if (where := device_of(a, b, factor)) is not None:
        return vector(a, where) - vector(b, where) * factor
    assert not isinstance(factor, Tensor)
    return [x - y * factor for x, y in zip(a, b, strict=True)]


def divided(value: Value, n: int) -> Value:
    """Return value / n."""
    # By a tensor: PyTorch divides by a Python number as a product with its reciprocal, which rounds differently.
    return value / vector([n], value.device)[0] if isinstance(value, Tensor) else value / n


def total(values: Sequence[Value] | Tensor) -> Value:
    """Return the sum of some numbers, or of a tensor (n,), added in the same order for both: by halves."""
    if isinstance(values, Tensor):
        while len(values) > 1:
            half = len(values) // 2
            values = torch.cat([values[:half] + values[half : 2 * half], values[2 * half :]])
        return values[0]
    known: list[Any] = list(values)
    while len(known) > 1:
        half = len(known) // 2
        known = [a + b for a, b in zip(known[:half], known[half : 2 * half], strict=True)] + known[2 * half :]
    return known[0]


def stacked(values: Sequence[Value], where: device) -> Tensor:
    """Return the values as one float64 tensor of shape (number of values,)."""
    return torch.stack(
        [v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=where) for v in values]
    )


def decay_factors(rates: Sequence[float], weight_decays: Sequence[float]) -> list[float]:
    """Return the factor of the old weights for each row: 1 - lr * weight_decay."""
    return [1.0 - lr * w for lr, w in zip(rates, weight_decays, strict=True)]
