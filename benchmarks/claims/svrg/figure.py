"""Losses of MeZO-SVRG and MeZO over example-forwards, and the variances of their estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...bench.registry import Row

_TITLES = {
    "far": "least squares, from afar",
    "near-optimum": "least squares, near the optimum",
    "digits": "digits, one hidden layer",
}
_METHODS = ("mezo", "mezo-full-batch", "svrg-q2", "svrg-q5", "svrg-q10", "svrg-q5-separate")
_PARTS = {"direction": "C0", "minibatch": "C1", "anchor": "C2"}


def choose(rows: Sequence[Row]) -> list[Row]:
    """Means over the seeds: of runs with a budget of example-forwards, and of variances."""
    means = [row for row in rows if row.get("run_seed") is None and row.get("correct")]
    shown = [row for row in means if row.get("problem") in _TITLES and row.get("budget") == "queries"]
    return [*shown, *(row for row in means if row.get("claim") == "svrg-variance")]


def draw(figure: Any, rows: Sequence[Row]) -> None:
    problems = [problem for problem in _TITLES if any(row.get("problem") == problem for row in rows)]
    variances = [row for row in rows if row["claim"] == "svrg-variance"]
    panels = len(problems) + bool(variances)
    across = min(panels, 2)
    axes = figure.subplots(-(-panels // across), across, squeeze=False).flatten()
    for panel, problem in zip(axes, problems, strict=False):
        _runs(panel, [row for row in rows if row.get("problem") == problem])
        panel.set_title(_TITLES[problem], fontsize="small")
    if problems:
        axes[0].set_ylabel("training loss above its floor", fontsize="small")
        axes[0].legend(fontsize="x-small")
    if variances:
        _variances(axes[panels - 1], variances)
    for unused in axes[panels:]:
        unused.remove()


def _runs(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        points = [i for i in range(1, 100) if row.get(f"loss_{i}") is not None]
        x, y, sd = (
            np.array([row[key.format(i)] or 0.0 for i in points]) for key in ("queries_{}", "loss_{}", "loss_{}_sd")
        )
        colour, separate = f"C{_METHODS.index(row['method'])}", "separate" in row["method"]
        axes.plot(x, y, color=colour, label=row["method"], ls="--" if separate else "-")
        axes.fill_between(x, np.maximum(y - sd, y / 10), y + sd, color=colour, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.set_xlabel("example-forwards", fontsize="small")


def _variances(axes: Any, rows: Sequence[Row]) -> None:
    """Stacks of each part, for MeZO and for MeZO-SVRG with shared and with separate directions at each place."""
    places = list(dict.fromkeys(row["place"] for row in rows))
    by = {(row["place"], row["directions"]): row for row in rows}
    for at, place in enumerate(places):
        for side, (directions, who) in enumerate((("shared", "mezo_"), ("shared", ""), ("separate", ""))):
            row, bottom = by.get((place, directions), {}), 0.0
            for part, colour in _PARTS.items():
                if (height := row.get(who + part)) is not None:
                    label = part if at == 0 and side == 1 else None
                    axes.bar(
                        at + 0.27 * (side - 1),
                        height / row["mezo_variance"],
                        0.25,
                        bottom=bottom,
                        color=colour,
                        label=label,
                    )
                    bottom += height / row["mezo_variance"]
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xticks(range(len(places)), places, rotation=20, ha="right", fontsize="x-small")
    axes.set_ylabel("variance ÷ MeZO's", fontsize="small")
    axes.set_title(
        f"MeZO, shared, separate; last step before an anchor, q = {rows[0]['anchor_every']}", fontsize="small"
    )
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.legend(fontsize="x-small", ncols=3, loc="upper left")
