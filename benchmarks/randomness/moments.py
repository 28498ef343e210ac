"""`moments`: moments, tails, histogram and extremes of many values, each beside what it should be for a normal.

The moments are means of Hermite polynomials He_k. These are uncorrelated with variance k!, so their standard errors are
exact: of He_1 the mean, of He_2 the variance less 1, and of the next ones what a skewness, an excess kurtosis and a
sixth moment measure when mean and variance are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom, chisquare, kstwobign
from torch import Tensor

from ..bench.registry import Row
from .sources import Source, tensors

NAMES = {1: "mean", 2: "variance - 1", 3: "skewness", 4: "excess kurtosis", 6: "sixth Hermite moment"}
_THRESHOLDS = [k / 2 for k in range(2, 14)]
_PER_SIGMA = 128  # cells of the histogram; a power of two, so that their edges are float32 and x * 128 is exact
_HALF = 8 * _PER_SIGMA  # cells on each side; the outermost hold all that lies further out
_LEAST_EXPECTED = 10  # in a cell of the chi-square


class Sample:
    """Sums, the largest size and a histogram of values as they go by."""

    def __init__(self) -> None:
        self.values = 0
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64)  # of x^k
        self.counts = torch.zeros(2 * _HALF, dtype=torch.int64)
        self.largest = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Take float32 [n]."""
        self.values += len(x)
        self.largest = torch.maximum(self.largest, x.abs().max())
        cells = x.mul(_PER_SIGMA).floor_().clamp_(-_HALF, _HALF - 1).add_(_HALF)
        self.counts += torch.bincount(cells.int(), minlength=2 * _HALF)
        x = x.double()
        square = x.square()
        cube = square * x
        self.sums += torch.stack([x.sum(), square.sum(), cube.sum(), square.dot(square), cube.dot(cube)])


def statistics(source: Source, values: int) -> list[Row]:
    sample = Sample()
    for x in tensors(source, values):
        sample.add(x)
    moment = dict(zip(NAMES, (sample.sums / values).tolist(), strict=True))
    rows = [
        _row(NAMES[k], mean, 0.0, math.sqrt(math.factorial(k) / values), None) for k, mean in hermite(moment).items()
    ]
    counts = sample.counts.numpy()
    rows += [_tail(sigma, counts, values) for sigma in _THRESHOLDS]
    largest = _largest(sample.largest.item(), values) | {"largest_possible": source.largest}
    return [*rows, _chi_square(counts, values), _kolmogorov(counts, values), largest]


def hermite(moment: Mapping[int, float]) -> dict[int, float]:
    """E He_k for k = 1, 2, 3, 4, 6 from E x^k for the same k."""
    return {
        1: moment[1],
        2: moment[2] - 1,
        3: moment[3] - 3 * moment[1],
        4: moment[4] - 6 * moment[2] + 3,
        6: moment[6] - 15 * moment[4] + 45 * moment[2] - 15,
    }


def beyond(sigma: float) -> float:
    """P(|z| >= sigma)."""
    return 2 * float(ndtr(-sigma))


def _row(statistic: str, measured: float, expected: float, error: float, p_value: float | None) -> Row:
    """Without a p-value, that of the distance in standard errors."""
    z = (measured - expected) / error
    p_value = beyond(abs(z)) if p_value is None else p_value
    return {
        "statistic": statistic, "measured": measured, "expected": expected, "standard_error": error, "z": z,
        "p_value": p_value,
    }  # fmt: skip


def _tail(sigma: float, counts: NDArray[Any], values: int) -> Row:
    off = round(sigma * _PER_SIGMA)
    count = int(counts[: _HALF - off].sum() + counts[_HALF + off :].sum())
    p = beyond(sigma)
    two_sided = 2 * float(min(binom.cdf(count, values, p), binom.sf(count - 1, values, p)))
    return _row(f"|z| > {sigma:g}", float(count), values * p, math.sqrt(values * p * (1 - p)), min(1.0, two_sided))


def _below() -> NDArray[Any]:
    """Phi of the upper edge of each cell; of the last, which has none, 1."""
    return np.append(ndtr(np.arange(1 - _HALF, _HALF) / _PER_SIGMA), 1.0)


def _chi_square(counts: NDArray[Any], values: int) -> Row:
    """Of the cells, those of the tails put together until each is expected often enough."""
    expected = values * np.diff(_below(), prepend=0.0)
    inner = np.flatnonzero(expected >= _LEAST_EXPECTED)
    if len(inner) < 2:
        raise ValueError(f"{values} values are too few for a histogram of {len(counts)} cells")
    starts = [0, *range(inner[0] + 1, inner[-1] + 1)]
    found = chisquare(np.add.reduceat(counts, starts), np.add.reduceat(expected, starts))
    freedom = len(starts) - 1
    name = f"chi-square, {len(starts)} cells"
    return _row(name, float(found.statistic), float(freedom), math.sqrt(2 * freedom), float(found.pvalue))


def _kolmogorov(counts: NDArray[Any], values: int) -> Row:
    """At the edges of the cells alone, so that the p-value is, if anything, too large."""
    distance = float(np.abs(counts.cumsum() / values - _below()).max())
    p_value = float(kstwobign.sf(math.sqrt(values) * distance))
    return {"statistic": "Kolmogorov-Smirnov distance", "measured": distance, "p_value": p_value}


def _largest(largest: float, values: int) -> Row:
    """The probability of a largest value so small, or so large."""
    none_beyond = math.exp(-values * beyond(largest))
    return {"statistic": "largest |z|", "measured": largest, "p_value": min(1.0, 2 * min(none_beyond, 1 - none_beyond))}
