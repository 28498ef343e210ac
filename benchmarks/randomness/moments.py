"""`moments`: moments, tails, histogram and extremes of many values, each beside what it should be for a normal.

The moments are means of Hermite polynomials He_k. These are uncorrelated with variance k!, so their standard errors are
exact: of He_1 the mean, of He_2 the variance less 1, and of the next ones what a skewness, an excess kurtosis and a
sixth moment measure when mean and variance are known.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from ..bench.registry import Case, Row
from .sample import CELLS_PER_SIGMA, LIMIT, PER_TENSOR, Sample, tensors
from .sources import SOURCES, Source
from .verdict import judged, verdict

THRESHOLDS = tuple(k / 2 for k in range(2, 14))
_LEAST_EXPECTED = 10  # in a cell of the chi-square


def cases(options: Namespace) -> Iterator[Case]:
    for name in options.generators:
        source = SOURCES[name](options.device)
        values = options.triton_values if name == "tl.randn" and options.device == "cpu" else options.values
        facts = {"experiment": "moments", "generator": name, "device": options.device, "values": values}
        yield Case(f"moments/{name}", facts, partial(_measure, source, values, options.threads), source.skipped())


def _measure(source: Source, values: int, threads: int) -> list[Row]:
    import scipy.stats  # noqa: F401  # told to be missing before the minutes, not after

    torch.set_num_threads(threads)
    sample = Sample(source.device)
    for x in tensors(source, values):
        sample.add(x)
    if wrong := source.wrong(PER_TENSOR):
        return [{"correct": False, "wrong": wrong}]
    correct = True if source.generator == "zo.noise" else None
    return [{"correct": correct, **row} for row in statistics(sample, source.largest())]


def hermite(moment: Mapping[int, float]) -> dict[int, float]:
    """E He_k for k = 1, 2, 3, 4, 6 from E x^k for the same k."""
    return {
        1: moment[1],
        2: moment[2] - 1,
        3: moment[3] - 3 * moment[1],
        4: moment[4] - 6 * moment[2] + 3,
        6: moment[6] - 15 * moment[4] + 45 * moment[2] - 15,
    }


NAMES = {1: "mean", 2: "variance - 1", 3: "skewness", 4: "excess kurtosis", 6: "sixth Hermite moment"}


def statistics(sample: Sample, largest_possible: float | None = None) -> list[Row]:
    """Rows of all statistics, held to the bound that so many p-values give."""
    rows = [_moment(k, value, sample.values) for k, value in hermite(sample.raw_moments()).items()]
    counts = sample.counts()
    rows += [_tail(sigma, counts, sample.values) for sigma in THRESHOLDS]
    rows += [_chi_square(counts, sample.values), _kolmogorov(counts, sample.values)]
    return judged([*rows, _extreme(sample) | {"largest_possible": largest_possible}])


def _moment(k: int, value: float, values: int) -> Row:
    error = math.sqrt(math.factorial(k) / values)
    z = value / error
    return {
        "statistic": NAMES[k],
        "measured": value,
        "expected": 0.0,
        "standard_error": error,
        "z": z,
        "p_value": math.erfc(abs(z) / math.sqrt(2)),
    }


def beyond(sigma: float) -> float:
    """P(|z| >= sigma)."""
    return math.erfc(sigma / math.sqrt(2))


def _tail(sigma: float, counts: torch.Tensor, values: int) -> Row:
    from scipy.stats import binom

    middle, off = LIMIT * CELLS_PER_SIGMA, round(sigma * CELLS_PER_SIGMA)
    count = int(counts[: middle - off].sum() + counts[middle + off :].sum())
    p = beyond(sigma)
    error = math.sqrt(values * p * (1 - p))
    return {
        "statistic": f"|z| > {sigma:g}",
        "measured": float(count),
        "expected": values * p,
        "standard_error": error,
        "z": (count - values * p) / error,
        "p_value": min(1.0, 2 * float(min(binom.cdf(count, values, p), binom.sf(count - 1, values, p)))),
    }


def _probabilities_below() -> torch.Tensor:
    """Phi of the upper edge of each cell; of the last, which has none, 1."""
    half = LIMIT * CELLS_PER_SIGMA
    edges = torch.arange(1 - half, half, dtype=torch.float64) / CELLS_PER_SIGMA
    return torch.cat([torch.special.ndtr(edges), torch.ones(1, dtype=torch.float64)])


def _chi_square(counts: torch.Tensor, values: int) -> Row:
    """Of the cells, those of the tails put together until each is expected often enough."""
    from scipy.stats import chi2

    below = _probabilities_below()
    expected = values * torch.diff(below, prepend=torch.zeros(1, dtype=torch.float64))
    inner = torch.nonzero(expected >= _LEAST_EXPECTED).flatten()
    if len(inner) < 2:
        raise ValueError(f"{values} values are too few for a histogram of {len(counts)} cells")
    first, last = int(inner[0]), int(inner[-1])

    def merged(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[: first + 1].sum()[None], x[first + 1 : last], x[last:].sum()[None]]).double()

    seen, hoped = merged(counts), merged(expected)
    statistic, freedom = ((seen - hoped) ** 2 / hoped).sum().item(), len(seen) - 1
    return {
        "statistic": f"chi-square, {len(seen)} cells",
        "measured": statistic,
        "expected": float(freedom),
        "standard_error": math.sqrt(2 * freedom),
        "z": (statistic - freedom) / math.sqrt(2 * freedom),
        "p_value": float(chi2.sf(statistic, freedom)),
    }


def _kolmogorov(counts: torch.Tensor, values: int) -> Row:
    """Over the edges of the cells alone, so that the p-value is, if anything, too large."""
    from scipy.stats import kstwobign

    distance = (counts.cumsum(0) / values - _probabilities_below()).abs().max().item()
    return {
        "statistic": "Kolmogorov-Smirnov distance",
        "measured": distance,
        "p_value": float(kstwobign.sf(math.sqrt(values) * distance)),
    }


def _extreme(sample: Sample) -> Row:
    """The probability of a largest value so small, or so large."""
    low, high = sample.extremes()
    largest = max(-low, high)
    none_beyond = math.exp(-sample.values * beyond(largest))
    return {"statistic": "largest |z|", "measured": largest, "p_value": min(1.0, 2 * min(none_beyond, 1 - none_beyond))}


def cells(row: Row) -> dict[str, str]:
    def text(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    return {
        "values": f"{row['values']:.3g}",
        "statistic": row["statistic"],
        "measured": text("measured", ".6g"),
        "expected": text("expected", ".6g"),
        "z": text("z", "+.2f"),
        "p": text("p_value", ".2g"),
        "largest possible": text("largest_possible", ".4f"),
        "not by chance": verdict(row),
    }
