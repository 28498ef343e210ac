"""Means, ratios and differences over the seeds of runs, with 95 % intervals (Student's t) and their verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from ..bench.registry import Row

VERDICTS = ("reproduced", "refuted", "undecided")
Interval = tuple[float | None, float | None, float | None]  # mean, low, high


def over_seeds(known: Row, seeds: Sequence[int], found: Sequence[Row]) -> list[Row]:
    """A row for each seed, then their means with standard deviations. Values are None where a run diverged.

    Args:
        known: columns of every row.
        seeds: of the runs.
        found: numbers of each run; those that are infinite or missing tell that it diverged.
    """
    told = [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in found]
    each = [{"run_seed": seed} | row for seed, row in zip(seeds, told, strict=True)]
    mean: Row = {"run_seed": None, "runs": len(found)}
    for key in dict.fromkeys(key for row in found for key in row):
        values = [row.get(key, math.inf) for row in found]
        finite = all(map(math.isfinite, values))
        mean |= {key: fmean(values) if finite else None}
        mean |= {f"{key}_sd": stdev(values) if finite and len(values) > 1 else None}
    return [known | row for row in (*each, mean)]


def mean(values: Sequence[float], name: str) -> Row:
    """The mean's interval in NAME_low and NAME_high; None with a single seed, or where a run diverged."""
    _, low, high = _interval(values if all(map(math.isfinite, values)) else [])
    return {f"{name}_low": low, f"{name}_high": high}


def ratio(values: Sequence[float], baseline: Sequence[float], name: str, bound: float = 1.0) -> Row:
    """Geometric mean of value / baseline in NAME_ratio, with _low and _high, and NAME_verdict: is it below the bound?

    Interval and verdict are None with a single seed; all are None where a run diverged.
    """
    positive = all(0 < v < math.inf for v in (*values, *baseline))
    logs = [math.log(a / b) for a, b in zip(values, baseline, strict=True)] if positive else []
    mean, low, high = (None if x is None else math.exp(x) for x in _interval(logs))
    return _columns((mean, low, high), bound, f"{name}_ratio", f"{name}_verdict")


def difference(values: Sequence[float], baseline: Sequence[float], name: str) -> Row:
    """Mean of value - baseline in NAME_difference, with _low, _high and _verdict: is it below 0?"""
    finite = all(map(math.isfinite, (*values, *baseline)))
    found = _interval([a - b for a, b in zip(values, baseline, strict=True)] if finite else [])
    return _columns(found, 0.0, f"{name}_difference", f"{name}_difference_verdict")


def _interval(values: Sequence[float]) -> Interval:
    if len(values) < 2:
        return (values[0] if values else None), None, None
    from scipy import stats

    mean, half = fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _columns(found: Interval, bound: float, key: str, verdict: str) -> Row:
    _, low, high = found
    said = None
    if low is not None and high is not None:
        said = VERDICTS[0] if high < bound else VERDICTS[1] if low > bound else VERDICTS[2]
    return {**dict(zip((key, f"{key}_low", f"{key}_high"), found, strict=True)), verdict: said}
