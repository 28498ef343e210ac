"""How much of a MeZO step is forwards, over the tokens of its batch: with published passes, and with ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row

_FORWARDS = "#52606d"
_SIDES = (("baseline_", "MeZO's published passes", "#cbd2d9"), ("", "our passes", "#d64545"))


def choose(rows: Sequence[Row]) -> list[Row]:
    """Steps against the published ones."""
    found = [row for row in rows if row.get("claim") == "perturbation-dominates" and row.get("correct")]
    return sorted(found, key=lambda row: row["batch"] * row["tokens"])


def draw(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    for side, (who, label, colour) in enumerate(_SIDES):
        places = [i + 0.4 * (side - 0.5) for i in range(len(rows))]
        forwards = [1e3 * row[f"{who}forwards_seconds_median"] for row in rows]
        rest = [1e3 * row[f"{who}seconds_median"] - ms for row, ms in zip(rows, forwards, strict=True)]
        axes.bar(places, forwards, 0.36, color=_FORWARDS, label="forwards" if side else None)
        bars = axes.bar(places, rest, 0.36, bottom=forwards, color=colour, label=label)
        axes.bar_label(bars, [f"{1 - row[f'{who}forwards_share']:.0%}" for row in rows], padding=2, fontsize="small")
    first = rows[0]
    axes.set_xticks(range(len(rows)), [f"{row['batch']} x {row['tokens']}" for row in rows])
    axes.set(xlabel="examples x tokens", ylabel="ms a step")
    axes.set_title(f"A MeZO step of {first['shape']}: what is not forwards ({first['device_name']})", fontsize="medium")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
