"""`correlations`: of values, of their squares and of their signs, between those that should be independent.

Each is a mean of products with mean 0 and variance 1 (x y; (x² - 1)(y² - 1) / 2; sign x sign y), so its standard error
is exact. A group of pairings has one row for each kind, with the largest of its |z| and the p-value of that, the
largest of so many.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ..bench.registry import Case, Row
from .pairings import Pairing, of_noise, of_source
from .sample import PER_TENSOR
from .sources import SOURCES, Source
from .verdict import judged, verdict

KINDS = ("values", "squares", "signs")


def cases(options: Namespace) -> Iterator[Case]:
    for name in options.generators:
        source = SOURCES[name](options.device)
        values = options.triton_values if name == "tl.randn" and options.device == "cpu" else options.values
        facts = {"experiment": "correlations", "generator": name, "device": options.device, "values": values}
        yield Case(f"correlations/{name}", facts, partial(_measure, source, values, options), source.skipped())


def _measure(source: Source, values: int, options: Namespace) -> list[Row]:
    torch.set_num_threads(options.threads)
    if wrong := source.wrong(PER_TENSOR):
        return [{"correct": False, "wrong": wrong}]
    ours = source.generator == "zo.noise"
    count = min(PER_TENSOR, values)
    pairings = [*of_source(source, count), *(of_noise(source.device, count) if ours else ())]
    return [{"correct": True if ours else None, **row} for row in statistics(pairings, values, count)]


def products(x: Tensor, y: Tensor) -> Tensor:
    """float64 [3]: the sums of the products of each kind."""
    signs = x.sign().mul_(y.sign()).sum(dtype=torch.float64)
    x, y = x.double(), y.double()
    values = x.dot(y)
    squares = x.square_().sub_(1).dot(y.square_().sub_(1)) / 2
    return torch.stack([values, squares, signs])


def statistics(pairings: Sequence[Pairing], values: int, count: int) -> list[Row]:
    """A row for each group and kind.

    Args:
        pairings: those of a group one after the other.
        values: that a group draws; its pairings share them out.
        count: of values in the tensors that a pairing draws.
    """
    rows = []
    for group, members in groupby(pairings, key=lambda pairing: pairing.group):
        rows += _group(group, list(members), values, count)
    return judged(rows)


def _group(group: str, members: Sequence[Pairing], values: int, count: int) -> list[Row]:
    rounds = max(1, values // (count * len(members)))
    z = []
    for pairing in members:
        total, pairs = torch.zeros(len(KINDS), dtype=torch.float64), 0
        for round in range(rounds):
            x, y = pairing.draw(round)
            total, pairs = total.to(x.device) + products(x, y), pairs + len(x)
        z.append((total / math.sqrt(pairs)).tolist())
    return [_row(group, kind, members, [of_one[k] for of_one in z], pairs) for k, kind in enumerate(KINDS)]


def _row(group: str, kind: str, members: Sequence[Pairing], z: Sequence[float], pairs: int) -> Row:
    worst = max(range(len(z)), key=lambda i: abs(z[i]))
    one = math.erfc(abs(z[worst]) / math.sqrt(2))
    return {
        "statistic": f"{group}, {kind}",
        "tests": len(z),
        "pairs": pairs,
        "at": members[worst].label or None,
        "measured": z[worst] / math.sqrt(pairs),
        "expected": 0.0,
        "standard_error": 1 / math.sqrt(pairs),
        "z": z[worst],
        "p_value": -math.expm1(len(z) * math.log1p(-one)) if one < 1 else 1.0,
    }


def cells(row: Row) -> dict[str, str]:
    return {
        "statistic": row["statistic"],
        "tests": str(row["tests"]),
        "pairs each": f"{row['pairs']:.3g}",
        "largest": f"{row['measured']:+.2e}",
        "z": f"{row['z']:+.2f}",
        "at": row["at"] or "",
        "p": f"{row['p_value']:.2g}",
        "not by chance": verdict(row),
    }
