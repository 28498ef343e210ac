"""Ratios and differences of paired measurements with the interval that their spread over seeds allows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ..bench.registry import Row

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
VERDICTS = ("reproduced", "refuted", "undecided")


def ratio(values: Sequence[float], baseline: Sequence[float], name: str) -> Row:
    """Geometric mean of value / baseline over the seeds, its 95 % interval, and whether that is below 1 or above.

    Returns:
        `NAME_ratio`, `NAME_ratio_low`, `NAME_ratio_high`, `NAME_verdict` of the claim that the ratio is below 1. All
        are None but the first with a single seed, and all four where a run diverged.
    """
    keys = [f"{name}_{key}" for key in ("ratio", "ratio_low", "ratio_high", "verdict")]
    if not all(math.isfinite(v) and v > 0 for v in (*values, *baseline)):
        return dict.fromkeys(keys)
    logs = [math.log(a / b) for a, b in zip(values, baseline, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return dict(zip(keys, (math.exp(mean), None, None, None), strict=True))
    half = _half(logs)
    low, high = math.exp(mean - half), math.exp(mean + half)
    return dict(zip(keys, (math.exp(mean), low, high, _verdict(low, high, 1.0)), strict=True))


def spread(row: Row, values: Sequence[float], key: str) -> Row:
    """The mean and the standard deviation under `key` and `key_sd`, None where a run diverged or there is but one."""
    finite = all(math.isfinite(v) for v in values)
    mean = statistics.fmean(values) if finite else None
    return {**row, key: mean, f"{key}_sd": statistics.stdev(values) if finite and len(values) > 1 else None}


def difference(values: Sequence[float], baseline: Sequence[float], name: str) -> Row:
    """Mean of value - baseline over the seeds, its 95 % interval, and whether that is below 0 or above.

    Returns:
        `NAME_difference`, `NAME_difference_low`, `NAME_difference_high`, `NAME_difference_verdict` of the claim that
        the difference is below 0. All are None but the first with a single seed, and all four where a run diverged.
    """
    keys = [f"{name}_difference{key}" for key in ("", "_low", "_high", "_verdict")]
    if not all(math.isfinite(v) for v in (*values, *baseline)):
        return dict.fromkeys(keys)
    off = [a - b for a, b in zip(values, baseline, strict=True)]
    mean = statistics.fmean(off)
    if len(off) == 1:
        return dict(zip(keys, (mean, None, None, None), strict=True))
    half = _half(off)
    return dict(zip(keys, (mean, mean - half, mean + half, _verdict(mean - half, mean + half, 0.0)), strict=True))


def _half(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean."""
    return _T[min(len(values) - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def _verdict(low: float, high: float, bound: float) -> str:
    return VERDICTS[0] if high < bound else VERDICTS[1] if low > bound else VERDICTS[2]
