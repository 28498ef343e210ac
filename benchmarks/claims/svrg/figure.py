"""Losses of MeZO-SVRG and MeZO over example-forwards, and the variances of their estimates, from rows of `claims`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...bench.registry import Row

HEADINGS = (
    "claim",
    "problem",
    "method",
    "place",
    "anchor_every",
    "directions",
    "queries",
    "loss",
    "mezo_variance",
    "variance",
)
_TITLES = {
    "far": "least squares, from afar",
    "near-optimum": "least squares, near the optimum",
    "digits": "digits, one hidden layer",
}
_SHOWN = ("mezo", "mezo-full-batch", "svrg-q2", "svrg-q5", "svrg-q10", "svrg-q5-separate")
_Q = 5  # of the variances shown


def choose(rows: Sequence[Row]) -> list[Row]:
    """Means over the seeds: of runs with a budget of example-forwards, and of variances."""
    return [
        row
        for row in rows
        if row.get("run_seed") is None
        and row.get("correct")
        and (
            (row.get("claim") == "svrg-variance" and row.get("anchor_every") == _Q)
            or (row.get("problem") in _TITLES and row.get("budget") == "queries" and row.get("method") in _SHOWN)
        )
    ]


def draw(figure: Any, rows: Sequence[Row]) -> None:
    runs = {problem: [row for row in rows if row.get("problem") == problem] for problem in _TITLES}
    runs = {problem: found for problem, found in runs.items() if found}
    variances = [row for row in rows if row["claim"] == "svrg-variance"]
    panels = len(runs) + bool(variances)
    across = min(panels, 2)
    axes = figure.subplots(-(-panels // across), across, squeeze=False).flatten()
    for unused in axes[panels:]:
        unused.remove()
    for panel, (problem, found) in zip(axes, runs.items(), strict=False):
        _runs(panel, found)
        panel.set_title(_TITLES[problem], fontsize="small")
    if len(runs):
        axes[0].set_ylabel("training loss above its floor", fontsize="small")
        axes[0].legend(fontsize="x-small")
    if variances:
        _variances(axes[panels - 1], variances)


def _runs(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        points = [i for i in range(1, 100) if row.get(f"loss_{i}") is not None]
        x, y = ([row[f"{key}_{i}"] for i in points] for key in ("queries", "loss"))
        sd = [row[f"loss_{i}_sd"] or 0.0 for i in points]
        colour = f"C{_SHOWN.index(row['method'])}"
        axes.plot(x, y, color=colour, label=row["method"], ls="--" if "separate" in row["method"] else "-")
        low = [max(a - b, a / 10) for a, b in zip(y, sd, strict=True)]
        axes.fill_between(x, low, [a + b for a, b in zip(y, sd, strict=True)], color=colour, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.set_xlabel("example-forwards", fontsize="small")


def _variances(axes: Any, rows: Sequence[Row]) -> None:
    """Stacks of each part, for MeZO and for MeZO-SVRG with shared and with separate directions at each place."""
    places = list(dict.fromkeys(row["place"] for row in rows))
    parts = {"direction": "C0", "minibatch": "C1", "anchor": "C2"}
    by = {(row["place"], row["directions"]): row for row in rows}
    for at, place in enumerate(places):
        for side, directions in enumerate(("mezo", "shared", "separate")):
            row = by.get((place, "shared" if directions == "mezo" else directions))
            if row is None:
                continue
            bottom = 0.0
            for part, colour in parts.items():
                height = row.get(f"mezo_{part}" if directions == "mezo" else part)
                if height is None:
                    continue
                height /= row["mezo_variance"]
                label = part if at == side == 0 or (part == "anchor" and at == 0 and side == 1) else None
                axes.bar(at + 0.27 * (side - 1), height, 0.25, bottom=bottom, color=colour, label=label)
                bottom += height
    axes.axhline(1.0, color="black", lw=0.6)
    axes.set_xticks(range(len(places)), places, rotation=20, ha="right", fontsize="x-small")
    axes.set_ylabel("variance ÷ MeZO's", fontsize="small")
    axes.set_title(f"MeZO, shared, separate; last step before an anchor, q = {_Q}", fontsize="small")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    axes.legend(fontsize="x-small", ncols=3, loc="upper left")
