"""`population`: what noise v1 is over all of its words, computed and not sampled.

A value is a radius of 2^30 equally likely ones times the cosine or the sine of one of 2^23 angles, and its sign is a
bit of its own, so the odd moments are 0 and the even ones are products of two means. `values_to_notice` is after how
many values the difference from a normal is as large as one standard error. The rounding of the product is left out.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zo_kernels import spec

from ..bench.registry import Case, Row
from .moments import NAMES, beyond, hermite
from .uniforms import BITS, noticed

_BLOCK = 2**20
_ANGLES = 2**23
_RADII = 2**30  # odd numbers below 2^31
_TAILS = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)
_EVEN = (2, 4, 6)


@dataclass(frozen=True)
class Means:
    """Means of even powers: of the radius, and of cosine and sine."""

    radius: dict[int, float]
    cos: dict[int, float]
    sin: dict[int, float]


def cases(options: Namespace) -> Iterator[Case]:
    facts = {"experiment": "population", "generator": "zo.noise", "device": "cpu"}
    yield Case("population/zo.noise", facts, partial(_measure, options.threads))


def _measure(threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    cos, sin = angles()
    means = Means(radius_means(), powers(cos), powers(sin))
    rows = [row for part in ("cos", "sin") for row in _moments(part, means)]
    radii = largest_radii(min(_TAILS))
    rows += [_tail(sigma, radii, (cos, sin)) for sigma in _TAILS]
    bits = {"statistic": f"{BITS} bits of a normal's uniform", "measured": BITS, "values_to_notice": noticed(BITS)}
    return [{"correct": True, **row} for row in [*rows, bits]]


def radius_blocks() -> Iterator[tuple[Tensor, Tensor]]:
    """Words of distinct radii, int64, and how many of the 2^30 words have each.

    Odd numbers y below 2^24 are float32. Above, those within half the spacing of two neighbours are rounded to one;
    at 2^24 all are half way, and the ones with an even significand take two each.
    """
    yield from ((torch.arange(first + 1, first + _BLOCK, 2), torch.ones(1)) for first in range(0, 2**24, _BLOCK))
    for exponent in range(24, 31):
        spacing = max(4, 2 ** (exponent - 23))
        for first in range(2**exponent, 2 ** (exponent + 1), _BLOCK * spacing):
            y = torch.arange(first, min(first + _BLOCK * spacing, 2 ** (exponent + 1)), spacing)
            share = torch.full((len(y),), float(spacing // 2))
            if first == 2**exponent:  # below it floats lie half as far apart, or are all there
                share[0] = spacing / 4 + (0 if exponent == 24 else max(4, spacing // 2) / 4)
            yield y + 1, share
    yield torch.tensor([2**31 - 1]), torch.full((1,), 2**7 / 4)  # those that are rounded up to 2^31


def radius_means() -> dict[int, float]:
    """E r^k over all words."""
    sums, words = torch.zeros(len(_EVEN), dtype=torch.float64), 0.0
    for word, share in radius_blocks():
        square = spec.radius(word).double() ** 2
        share = share.double().expand_as(square)
        sums += torch.stack([(square ** (k // 2)).dot(share) for k in _EVEN])
        words += share.sum().item()
    if words != _RADII:
        raise AssertionError(f"{words} radius words were counted, and there are {_RADII}")
    return dict(zip(_EVEN, (sums / words).tolist(), strict=True))


def angles() -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle word, float64 [2^23]."""
    blocks = [spec.cos_sin(torch.arange(first, first + _BLOCK)) for first in range(0, _ANGLES, _BLOCK)]
    cos, sin = (torch.cat(parts).double() for parts in zip(*blocks, strict=True))
    return cos, sin


def powers(x: Tensor) -> dict[int, float]:
    return {k: (x**k).mean().item() for k in _EVEN}


def _moments(part: str, means: Means) -> list[Row]:
    of_angle = {"cos": means.cos, "sin": means.sin}[part]
    moment = {1: 0.0, 3: 0.0} | {k: means.radius[k] * of_angle[k] for k in _EVEN}
    elements = {"cos": "even elements", "sin": "odd elements"}[part]
    return [
        {
            "statistic": f"{NAMES[k]}, {elements}",
            "measured": value,
            "expected": 0.0,
            "values_to_notice": math.factorial(k) / value**2,
        }
        for k, value in hermite(moment).items()
        if k in _EVEN
    ]


def largest_radii(least: float) -> Tensor:
    """Radii above `least`, float64, ascending, those of the smallest words."""
    last = int(2**31 * math.exp(-(least**2) / 2)) + 3
    radii = spec.radius(torch.arange(1, last, 2)).double()
    return radii[radii >= least].sort().values


def _tail(sigma: float, radii: Tensor, parts: tuple[Tensor, Tensor]) -> Row:
    """P(|z| >= sigma), the mean of even and odd elements."""
    above = [len(radii) - torch.searchsorted(radii, sigma / part.abs()) for part in parts]
    found = sum(count.sum().item() for count in above) / (2 * _RADII * _ANGLES)
    expected = beyond(sigma)
    return {
        "statistic": f"P(|z| > {sigma:g})",
        "measured": found,
        "expected": expected,
        "values_to_notice": expected / (found - expected) ** 2 if found != expected else None,
    }


def cells(row: Row) -> dict[str, str]:
    return {
        "statistic": row["statistic"],
        "over all words": f"{row['measured']:.9g}",
        "of a normal": "" if row.get("expected") is None else f"{row['expected']:.9g}",
        "values to notice": "" if row["values_to_notice"] is None else f"{row['values_to_notice']:.2g}",
    }
