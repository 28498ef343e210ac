"""The tails: values beyond each threshold, in parts of what a normal has there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row

_LEAST_EXPECTED = 5
_TAIL = "|z| > "
_COLOURS = {"zo.noise": "#d64545", "torch.randn": "#1f2933", "tl.randn": "#9aa5b1"}


def choose(rows: Sequence[Row]) -> list[Row]:
    """Tail counts of every generator, where enough are expected to tell something."""
    return [
        row | {"sigma": float(row["statistic"].removeprefix(_TAIL))}
        for row in rows
        if row.get("experiment") == "moments"
        and (row.get("statistic") or "").startswith(_TAIL)
        and row["expected"] >= _LEAST_EXPECTED
    ]


def draw(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    names = list(dict.fromkeys(row["generator"] for row in rows))
    for i, name in enumerate(names):
        own = [row for row in rows if row["generator"] == name]
        axes.errorbar(
            [row["sigma"] + 0.05 * (i - (len(names) - 1) / 2) for row in own],
            [row["measured"] / row["expected"] for row in own],
            yerr=[1 / math.sqrt(row["expected"]) for row in own],
            fmt="o",
            capsize=3,
            color=_COLOURS[name],
            label=f"{name} on {own[0]['device']}, {own[0]['values']:.2g} values",
        )
    axes.axhline(1, color="#cbd2d9", linewidth=1, zorder=0)
    axes.set_ylim(0, 2.2)
    axes.set_xlabel("threshold, in standard deviations")
    axes.set_ylabel("values beyond it / expected of a normal (± one standard error)")
    axes.set_title("Tails of the noise")
    axes.legend(frameon=False, loc="upper left")
