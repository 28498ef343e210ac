"""Sums, extremes and a histogram of values as they go by, on their device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .sources import TENSORS, Source

PER_TENSOR = 2**17  # values; they and what is made of them stay in a processor's cache
CELLS_PER_SIGMA = 128  # a power of two: the edges of the histogram are float32, and x * 128 is exact
LIMIT = 8  # the outermost cells hold all beyond


class Sample:
    """What has gone by so far."""

    def __init__(self, device: str):
        self.values = 0
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2 * LIMIT * CELLS_PER_SIGMA, dtype=torch.int64, device=device)
        self._low = torch.tensor(math.inf, device=device)
        self._high = torch.tensor(-math.inf, device=device)
        self._cells, *self._doubles = (
            torch.empty(0, dtype=dtype, device=device) for dtype in (torch.float32, *3 * (torch.float64,))
        )

    def add(self, x: Tensor) -> None:
        """Take float32 [n]."""
        self.values += len(x)
        low, high = torch.aminmax(x)
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        half = LIMIT * CELLS_PER_SIGMA
        cells = torch.mul(x, CELLS_PER_SIGMA, out=_sized(self._cells, x)).floor_().clamp_(-half, half - 1).add_(half)
        self._counts += torch.bincount(cells.int(), minlength=2 * half)
        wide, square, cube = (_sized(buffer, x) for buffer in self._doubles)
        torch.mul(wide.copy_(x), wide, out=square)
        torch.mul(square, wide, out=cube)
        self._sums += torch.stack([wide.sum(), square.sum(), cube.sum(), square.dot(square), cube.dot(cube)])

    def raw_moments(self) -> dict[int, float]:
        """Means of x^k for k = 1, 2, 3, 4, 6."""
        return dict(zip((1, 2, 3, 4, 6), (self._sums / self.values).tolist(), strict=True))

    def counts(self) -> Tensor:
        """int64, on the CPU: how many values lie in each cell of the histogram, from -LIMIT up."""
        return self._counts.cpu()

    def extremes(self) -> tuple[float, float]:
        return self._low.item(), self._high.item()


def _sized(buffer: Tensor, x: Tensor) -> Tensor:
    """A buffer that is kept, made as long as x: fresh memory for each temporary takes longer than the arithmetic."""
    return buffer if len(buffer) == len(x) else buffer.resize_(len(x))


def tensors(source: Source, values: int, per_tensor: int = PER_TENSOR) -> Iterator[Tensor]:
    """So many values in tensors of a model, step after step."""
    step = number = 0
    while values > 0:
        yield source.tensor(step, number, per_tensor)[:values]
        values -= per_tensor
        number += 1
        if number == TENSORS:
            step, number = step + 1, 0
