"""Losses over steps of the methods on each task, means of the seeds with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row
from .learning import POINTS

HEADINGS = ("claim", "task", "arm", "lr", "dev_loss", "dev_loss_sd", "dev_loss_difference")


def choose(rows: Sequence[Row]) -> list[Row]:
    """The means; MeZO, which every claim has run, once for each task."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.get("experiment") == "learning" and row.get("runs") and row.get("dev_loss") is not None:
            claim = "16-bits" if row["claim"] == "16-bits" else "methods"
            found.setdefault((claim, row["task"], row["arm"]), {**row, "claim": claim})
    return list(found.values())


def draw(figure: Any, rows: list[Row]) -> None:
    panels = list(dict.fromkeys((row["claim"], row["task"]) for row in rows))
    panels.sort(key=lambda panel: panel[0] == "16-bits")
    across = min(len(panels), 2)
    every = figure.subplots(-(-len(panels) // across), across, squeeze=False).flatten()
    for unused in every[len(panels) :]:
        unused.remove()
    for axes, (claim, task) in zip(every, panels, strict=False):
        here = [row for row in rows if (row["claim"], row["task"]) == (claim, task)]
        for i, row in enumerate(here):
            steps = [row["steps"] * k / POINTS for k in range(POINTS + 1)]
            losses = [row["start_loss"], *(row[f"dev_loss_{k}"] for k in range(1, POINTS + 1))]
            colour = "black" if row["arm"] == "MeZO" else f"C{i % 10}"
            axes.plot(steps, losses, color=colour, label=row["arm"], linewidth=1.2)
            if row["dev_loss_sd"] is not None:
                axes.errorbar(steps[-1], losses[-1], row["dev_loss_sd"], color=colour, capsize=2)
        axes.set_title(f"{task}" + (", 16 bits" if claim == "16-bits" else ""), fontsize="medium")
        axes.set_xlabel("steps", fontsize="small")
        axes.legend(fontsize="xx-small", frameon=False, loc="upper right", ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("dev loss")
