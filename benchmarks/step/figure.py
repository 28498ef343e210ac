"""A step of each method: forwards, passes and the rest, ours and with published passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row

_PARTS = ("forwards", "passes", "other")


def choose(rows: Sequence[Row]) -> list[Row]:
    """Those against the published passes, whose parts are shown beside ours; of a case that was run twice the last."""
    found = {
        row["case"]: row
        for row in rows
        if row.get("forwards_seconds_median") is not None
        and row.get("baseline") == "published passes"
        and row.get("claim") is None
    }
    return [found[case] for case in sorted(found)]


def draw(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    for side, (who, hatch) in enumerate((("", None), ("baseline_", "//"))):
        places = [i + 0.42 * (side - 0.5) for i in range(len(rows))]
        bottom = [0.0] * len(rows)
        for k, part in enumerate(_PARTS):
            heights = [1e3 * row[f"{who}{part}_seconds_median"] for row in rows]
            label = f"{part}, {'with published passes' if who else 'ours'}"
            axes.bar(places, heights, 0.4, bottom=bottom, color=f"C{k}", hatch=hatch, edgecolor="white", label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=30, ha="right", fontsize="small")
    axes.set_ylabel("ms a step")
    axes.set_title(f"Measured: steps on {', '.join(dict.fromkeys(row['device_name'] for row in rows))}")
    axes.legend(fontsize="small")
