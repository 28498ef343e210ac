"""Losses over steps of the methods on each task, means of the seeds with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row
from .learning import POINTS


def choose(rows: Sequence[Row]) -> list[Row]:
    """The means; MeZO, which every claim has run, once for each task."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.get("experiment") == "learning" and row.get("runs") and row.get("dev_loss") is not None:
            panel = row["task"] + (", 16 bits" if row["claim"] == "16-bits" else "")
            found.setdefault((panel, row["arm"]), {**row, "panel": panel})
    return sorted(found.values(), key=lambda row: row["claim"] == "16-bits")


def draw(figure: Any, rows: list[Row]) -> None:
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    across = min(len(panels), 2)
    every = figure.subplots(-(-len(panels) // across), across, squeeze=False).flatten()
    for axes, panel in zip(every, panels, strict=False):
        for i, row in enumerate(row for row in rows if row["panel"] == panel):
            steps = [row["steps"] * k / POINTS for k in range(POINTS + 1)]
            losses = [row["start_loss"], *(row[f"dev_loss_{k}"] for k in range(1, POINTS + 1))]
            colour = "black" if row["arm"] == "MeZO" else f"C{i % 10}"
            axes.plot(steps, losses, color=colour, label=row["arm"], linewidth=1.2)
            if row["dev_loss_sd"] is not None:
                axes.errorbar(steps[-1], losses[-1], row["dev_loss_sd"], color=colour, capsize=2)
        axes.set_title(panel, fontsize="medium")
        axes.set_xlabel("steps", fontsize="small")
        axes.legend(fontsize="xx-small", frameon=False, loc="upper right", ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    for unused in every[len(panels) :]:
        unused.remove()
    every[0].set_ylabel("dev loss")
