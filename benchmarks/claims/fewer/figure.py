"""Losses over forwards on each task, means of the seeds with their spread at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...bench.registry import Row
from ..learning import noted
from .study import LATE

_OTHERS = ("signs, 4", "one-sided, 8")


def choose(rows: Sequence[Row]) -> list[Row]:
    """The means of the arms that are to need fewer forwards, and of what they are made of."""
    means = [row for row in rows if row.get("claim") == "fewer" and row.get("runs") and row.get("dev_loss") is not None]
    return [row for row in means if row["experiment"] == "forwards" or row.get("arm") in _OTHERS]


def draw(figure: Any, rows: list[Row]) -> None:
    panels, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "arm"))
    across = min(len(panels), 3)
    every = figure.subplots(-(-len(panels) // across), across, squeeze=False).flatten()
    for axes, panel in zip(every, panels, strict=False):
        for row in (row for row in rows if row["task"] == panel):
            steps = [0, *sorted(set(noted(row["steps"], LATE)))]
            forwards = [row["forwards_per_step"] * step for step in steps]
            losses = [row["start_loss"], *(row[f"dev_loss_{k}"] for k in range(1, len(steps)))]
            colour = "black" if row["arm"] == "MeZO" else f"C{arms.index(row['arm'])}"
            axes.plot(forwards, losses, color=colour, label=row["arm"], linewidth=1.2)
            if row["dev_loss_sd"] is not None:
                axes.errorbar(forwards[-1], losses[-1], row["dev_loss_sd"], color=colour, capsize=2)
        axes.set_title(panel, fontsize="medium")
        axes.set_xlabel("forwards", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    for unused in every[len(panels) :]:
        unused.remove()
    every[0].legend(fontsize="xx-small", frameon=False, loc="upper right")
    every[0].set_ylabel("dev loss")
