"""`signs`: are random signs fair, alone, in pairs, in threes and in fours, and are roundings independent of them?

Of the 128 signs that one counter gives, and of the 32 of a word, every product of distinct ones has mean 0 and variance
1, and two such products are uncorrelated. So the mean of n of them has a standard error of 1 / √n, and the sum of
squares of N standardised ones is a chi-square of N degrees of freedom, up to terms of 1 / n. Words are those of a run:
of the tensors of a model, step after step (`sources.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import binom, chi2
from torch import Tensor

from zo_kernels import spec

from ..bench.registry import Row
from .moments import beyond
from .sources import PER_TENSOR, TENSORS, Source, ids, tensors

_COUNTER, _WORD = 128, 32  # signs
_CELLS = 16  # bits of a pattern, and of a rounding
_LEAST_EXPECTED = 10
_MOST_WORDS = 2**20  # of which every three and every four of the signs are looked at: 496 * 496 products a word
_FEWER = 8  # times fewer roundings than signs, which take less time


class Sample:
    """Sums of signs and of their products as they go by, and how often patterns and numbers of -1 came."""

    def __init__(self) -> None:
        self.blocks = self.words = 0
        self.ones = torch.zeros(_COUNTER, dtype=torch.float64)
        self.twos = torch.zeros(_COUNTER, _COUNTER, dtype=torch.float64)
        pairs = _WORD * (_WORD - 1) // 2
        self.threes = torch.zeros(pairs, _WORD, dtype=torch.float64)
        self.fours = torch.zeros(pairs, pairs, dtype=torch.float64)
        self.patterns = torch.zeros(2**_CELLS, dtype=torch.int64)
        self.negative = torch.zeros(_COUNTER + 1, dtype=torch.int64)
        self._first, self._second = torch.triu_indices(_WORD, _WORD, offset=1)
        self._weights = 2 ** torch.arange(_CELLS)

    def add(self, z: Tensor) -> None:
        """Take float32 [a multiple of 128]. Sums of so few products of signs are exact in float32."""
        block, word = z.view(-1, _COUNTER), z.view(-1, _WORD)
        self.blocks += len(block)
        self.ones += block.sum(0)
        self.twos += block.T @ block
        if self.words < _MOST_WORDS:
            self.words += len(word)
            products = word[:, self._first] * word[:, self._second]
            self.threes += products.T @ word
            self.fours += products.T @ products
        bits = (z < 0).view(-1, _CELLS).long()
        self.patterns += torch.bincount(bits @ self._weights, minlength=2**_CELLS)
        self.negative += torch.bincount((block < 0).sum(1), minlength=_COUNTER + 1)

    def rows(self) -> list[Row]:
        first, second = self._first, self._second
        twos = self.twos[torch.ones_like(self.twos).triu(1) > 0]
        third = torch.arange(_WORD)
        threes = self.threes[third[None, :] > second[:, None]]  # first < second < third: each three once
        fours = self.fours[first[None, :] > second[:, None]]  # and each four
        groups = {
            "mean": (self.ones.sum()[None], self.blocks * _COUNTER),
            "each sign of a counter": (self.ones, self.blocks),
            "products of two of a counter": (twos, self.blocks),
            "products of three of a word": (threes, self.words),
            "products of four of a word": (fours, self.words),
        }
        rows = [row for name, (sums, n) in groups.items() for row in _of_sums(name, sums, n)]
        expected = torch.from_numpy(binom.pmf(np.arange(_COUNTER + 1), _COUNTER, 0.5))
        return [
            *rows,
            _of_cells(f"patterns of {_CELLS} neighbours", self.patterns),
            _of_cells("how many of a counter are -1", self.negative, expected),
        ]


def statistics(source: Source, values: int) -> list[Row]:
    sample = Sample()
    for z in tensors(source, values // _COUNTER * _COUNTER):
        sample.add(z)
    return [*sample.rows(), *roundings(source, values)]


def roundings(source: Source, values: int) -> list[Row]:
    """Of the bits that round: are they uniform, and independent of each other and of the signs of their elements?"""
    n, half = 0, _CELLS // 2
    alone, pairs, signed = (torch.zeros(2**_CELLS, dtype=torch.int64) for _ in range(3))
    correlated = torch.zeros(_CELLS, dtype=torch.float64)
    places = torch.arange(_CELLS)
    for number in range(max(1, values // PER_TENSOR // _FEWER)):
        step, tensor = divmod(number, TENSORS)
        negative = (source.tensor(step, tensor, PER_TENSOR) < 0).long()
        rho = rounding_bits(spec.direction_seed(0, step, 0), ids()[tensor])
        n += PER_TENSOR
        alone += torch.bincount(rho, minlength=2**_CELLS)
        signed += torch.bincount((rho & ~1) | negative, minlength=2**_CELLS)
        pairs += torch.bincount((rho[0::2] >> half) << half | rho[1::2] >> half, minlength=2**_CELLS)
        differ = ((rho[:, None] >> places) & 1) != negative[:, None]
        correlated += PER_TENSOR - 2 * differ.sum(0)
    return [
        _of_cells("roundings", alone),
        _of_cells("roundings of two neighbours, the high byte of each", pairs),
        _of_cells("a rounding but for its lowest bit, and the sign", signed),
        *_of_sums("products of a sign and a bit of its rounding", correlated, n),
    ]


def rounding_bits(seed: int, param_id: int) -> Tensor:
    """`spec.rounding_bits` of a tensor's elements, from whole words."""
    counter = torch.arange(PER_TENSOR // 8)
    zero = torch.zeros_like(counter)
    numbers = (counter, zero, zero + param_id, zero + spec.SIGN_ROUNDING_STREAM)
    words = torch.stack(spec.philox4x32(numbers, (seed & 0xFFFFFFFF, seed >> 32)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()


def _of_sums(name: str, sums: Tensor, n: int) -> Iterator[Row]:
    """Rows of sums of n products: the largest of their standardised means, and the sum of their squares if several."""
    z = sums / math.sqrt(n)
    worst = z.flatten()[z.abs().argmax()].item()
    one = beyond(abs(worst))
    largest = -math.expm1(len(z) * math.log1p(-one)) if one < 1 else 1.0
    yield {"statistic": f"{name}, largest", "tests": len(z), "pairs": n, "z": worst, "p_value": largest}
    if len(z) > 1:
        square = z.square().sum().item()
        p_value = 2 * min(float(chi2.cdf(square, len(z))), float(chi2.sf(square, len(z))))
        known = {"statistic": f"{name}, sum of squares", "tests": len(z), "pairs": n}
        yield {**known, "measured": square, "expected": float(len(z)), "p_value": p_value}


def _of_cells(name: str, counts: Tensor, probabilities: Tensor | None = None) -> Row:
    """A chi-square, two-sided, of cells that are equally likely unless their probabilities are given.

    Cells that are expected too rarely are put together with their neighbours.
    """
    total = int(counts.sum())
    if probabilities is None:
        while total < _LEAST_EXPECTED * len(counts):
            counts = counts.view(-1, 2).sum(1)
        probabilities = torch.full((len(counts),), 1 / len(counts))
    expected = probabilities.double().numpy() * total
    inner = np.flatnonzero(expected >= _LEAST_EXPECTED)
    starts = [0, *range(inner[0] + 1, inner[-1] + 1)]
    found, wanted = (np.add.reduceat(cells, starts) for cells in (counts.numpy(), expected))
    square, freedom = float(((found - wanted) ** 2 / wanted).sum()), len(starts) - 1
    p_value = 2 * min(float(chi2.cdf(square, freedom)), float(chi2.sf(square, freedom)))
    known = {"statistic": name, "tests": len(starts), "pairs": total}
    return {**known, "measured": square, "expected": float(freedom), "p_value": p_value}
