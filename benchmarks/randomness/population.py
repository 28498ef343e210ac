"""`population`: what noise v1 is over all of its words, computed and not sampled.

A value is a radius of 2^30 equally likely ones times the cosine or the sine of one of 2^23 angles, and its sign is a
bit of its own, so the odd moments are 0 and the even ones are products of two means. `values_to_notice` is after how
many values the difference from a normal is as large as one standard error. The rounding of the product is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from zo_kernels import spec

from ..bench.registry import Row
from .battery import BITS
from .moments import NAMES, beyond, hermite

_BLOCK = 2**22
_ANGLES = 2**23
_RADII = 2**30  # odd numbers below 2^31
_TAILS = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)
_EVEN = (2, 4, 6)


def statistics() -> list[Row]:
    radius, parts = radius_means(), angles()
    rows = []
    for elements, part in zip(("even elements", "odd elements"), parts, strict=True):
        moment = {1: 0.0, 3: 0.0} | {k: radius[k] * (part**k).mean().item() for k in _EVEN}
        rows += [
            {
                "statistic": f"{NAMES[k]}, {elements}",
                "measured": value,
                "expected": 0.0,
                "values_to_notice": math.factorial(k) / value**2,
            }
            for k, value in hermite(moment).items()
            if k in _EVEN
        ]
    radii = largest_radii(min(_TAILS))
    bits = {"statistic": f"{BITS} bits of a normal's uniform", "measured": BITS, "values_to_notice": noticed(BITS)}
    return [*rows, *(_tail(sigma, radii, parts) for sigma in _TAILS), bits]


def radii(last: int = 2**31, first: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Radii of the odd words from `first` to `last`, and how many have each (large ones are rounded); float64."""
    for begin in range(first, last, 2 * _BLOCK):
        words = torch.arange(begin, min(begin + 2 * _BLOCK, last), 2)
        _, counts = words.float().unique_consecutive(return_counts=True)
        yield spec.radius(words[counts.cumsum(0) - 1]).double(), counts.double()


def radius_means() -> dict[int, float]:
    """E r^k over all words."""
    sums = sum(torch.stack([(r**k).dot(counts) for k in _EVEN]) for r, counts in radii())
    return dict(zip(_EVEN, (sums / _RADII).tolist(), strict=True))


def angles() -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle word, float64 [2^23]."""
    blocks = [spec.cos_sin(torch.arange(first, first + _BLOCK)) for first in range(0, _ANGLES, _BLOCK)]
    cos, sin = (torch.cat(parts).double() for parts in zip(*blocks, strict=True))
    return cos, sin


def largest_radii(least: float) -> Tensor:
    """Radii from `least` on, float64, ascending, those of the smallest words."""
    found = torch.cat([r for r, _ in radii(int(2**31 * math.exp(-(least**2) / 2)) + 3)])
    return found[found >= least].sort().values


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


def noticed(bits: int) -> float:
    """After how many values the rounding to float32 moves a chi-square of 2^bits cells by its standard deviation.

    A float32 between 1 and 2 stands for all numbers within half an ulp, 2^-24, of it, so the distribution function at
    float32 has values up to 2^-25 apart, and a cell of 2^-b holds only some 2^(25 - b) of them.
    """
    edges = torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits
    # The first float32 at or above each edge, and where the numbers that round to it begin.
    first = torch.special.ndtri(edges).float()
    low = torch.special.ndtr(first.double()) < edges
    first = torch.where(low, torch.nextafter(first, torch.tensor(math.inf)), first)
    begin = (first.double() + torch.nextafter(first, torch.tensor(-math.inf)).double()) / 2
    below = torch.cat([torch.zeros(1), torch.special.ndtr(begin), torch.ones(1)])
    off = below.diff() * 2**bits - 1
    return math.sqrt(2 * 2**bits) / off.square().mean().item()
