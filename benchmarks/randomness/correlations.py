"""`correlations`: of values, of their squares and of their signs, between those that should be independent.

Each is a mean of products with mean 0 and variance 1 (x y; (x² - 1)(y² - 1) / 2; sign x sign y), so its standard error
is exact. A group of pairings has one row for each kind, with the largest of its |z| and the p-value of that, the
largest of so many. Random signs have their own product alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from zo_kernels.spec import mix

from ..bench.registry import Row
from .moments import beyond
from .sources import PER_TENSOR, Ours, Signs, Source

_KINDS = ("values", "squares", "signs")
_LAGS = (*range(1, 9), 16, 64, 1024)
_LAGS_OF_SIGNS = (*range(1, 9), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 1024)  # of words and counters
_INDEX_BITS = range(20, 62)  # above those of an element in a pairing's tensor
_ID = 0x9E3779B9

Pair = tuple[Tensor, Tensor]
Groups = Mapping[str, Mapping[str, Callable[[int], Pair]]]  # group -> label -> the pairs of a round, of equal shape


def statistics(source: Source, values: int) -> list[Row]:
    count = min(PER_TENSOR, values)
    groups = {**of_source(source, count), **(of_noise(source, count) if isinstance(source, Ours) else {})}
    return of_groups(groups, values, count, _KINDS[2:] if isinstance(source, Signs) else _KINDS)


def of_source(source: Source, count: int) -> Groups:
    """Pairings of every generator: within the first tensor of a step, and with that of the next step."""

    def lagged(lag: int, round: int) -> Pair:
        x = source.tensor(round, 0, count)
        return x[:-lag], x[lag:]

    def members(round: int) -> Pair:
        pair = source.members(source.tensor(round, 0, count))
        assert pair is not None
        return pair

    pairs = source.members(source.tensor(0, 0, count)) is not None
    signs = isinstance(source, Signs)
    return {
        "lags": {
            f"lag {lag}": lambda round, lag=lag: lagged(lag, round) for lag in (_LAGS_OF_SIGNS if signs else _LAGS)
        },
        **({"halves of a word" if signs else "members of a Box-Muller pair": {"": members}} if pairs else {}),
        "next step": {"": lambda r: (source.tensor(2 * r, 0, count), source.tensor(2 * r + 1, 0, count))},
    }


def of_noise(source: Ours, count: int) -> Groups:
    """Pairings of noise v1: seeds, ids and indices that differ as little as they can, and signs with normals."""

    def z(seed: int, param_id: int = _ID, offset: int = 0) -> Tensor:
        return source.drawn(count, seed, param_id, offset)

    def normals(seed: int) -> Tensor:
        return Ours().drawn(count, seed, _ID)

    def halves(x: Tensor) -> Pair:
        fours = x[: count // 4 * 4].view(-1, 4)
        return fours[:, :2].flatten(), fours[:, 2:].flatten()

    def bits(numbers: range, pair: Callable[[int, int], Pair]) -> dict[str, Callable[[int], Pair]]:
        return {f"bit {b}": lambda round, b=b: pair(round, 1 << b) for b in numbers}

    signs = isinstance(source, Signs)
    return {
        **({"normals of the same seed": {"": lambda r: (z(r), normals(r))}} if signs else {}),
        **({} if signs else {"halves of a counter": {"": lambda r: halves(z(r))}}),
        "next id": {"": lambda r: (z(r), z(r, _ID + 1))},
        "next seed": {"": lambda r: (z(2 * r), z(2 * r + 1))},
        "next seed, neighbouring element": {
            "element +1": lambda r: (z(2 * r)[:-1], z(2 * r + 1)[1:]),
            "element -1": lambda r: (z(2 * r)[1:], z(2 * r + 1)[:-1]),
        },
        # Mixed, for of the seeds 0, 1, 2, ... the other one would be another round's.
        "one bit of the seed": bits(range(64), lambda r, bit: (z(mix(r)), z(mix(r) ^ bit))),
        "one bit of the id": bits(range(32), lambda r, bit: (z(r), z(r, _ID ^ bit))),
        "one bit of the index": bits(_INDEX_BITS, lambda r, bit: (z(r), z(r, offset=bit))),
    }


def products(x: Tensor, y: Tensor, kinds: Sequence[str] = _KINDS) -> Tensor:
    """float64: the sums of the products of each kind."""
    signs = x.sign().mul_(y.sign()).sum(dtype=torch.float64)
    if kinds == _KINDS[2:]:
        return signs[None]
    x, y = x.double(), y.double()
    return torch.stack([x.dot(y), x.square().sub_(1).dot(y.square().sub_(1)) / 2, signs])


def of_groups(groups: Groups, values: int, count: int, kinds: Sequence[str] = _KINDS) -> list[Row]:
    """A row for each group and kind of products.

    Args:
        groups: rounds of a pairing share no value.
        values: that a group draws; its pairings share them out.
        count: of values in the tensors that a pairing draws.
    """
    rows = []
    for group, members in groups.items():
        rounds = max(1, values // (count * len(members)))
        z = torch.empty(len(members), len(kinds), dtype=torch.float64)
        for i, draw in enumerate(members.values()):
            total, number = 0, 0
            for round in range(rounds):
                x, y = draw(round)
                total, number = total + products(x, y, kinds), number + len(x)
            z[i] = total / math.sqrt(number)
        rows += [_row(f"{group}, {kind}", list(members), z[:, k], number) for k, kind in enumerate(kinds)]
    return rows


def _row(statistic: str, labels: list[str], z: Tensor, pairs: int) -> Row:
    at = int(z.abs().argmax())
    worst, error = z[at].item(), 1 / math.sqrt(pairs)
    one = beyond(abs(worst))
    return {
        "statistic": statistic,
        "tests": len(z),
        "pairs": pairs,
        "at": labels[at] or None,
        "measured": worst * error,
        "expected": 0.0,
        "standard_error": error,
        "z": worst,
        "p_value": -math.expm1(len(z) * math.log1p(-one)) if one < 1 else 1.0,
    }
