"""Rows of the runs of an arm: one for each seed, and their mean beside the baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..bench.registry import Row
from .interval import difference, spread
from .learning import POINTS, Result


def run_rows(result: Result, baseline: Result, seeds: Sequence[int]) -> list[Row]:
    """The row of each run, then that of all, which compares them in pairs with the baseline's."""
    known: Row = {
        "correct": True,
        "arm": result.arm.name,
        **result.arm.facts,
        "lr": result.lr,
        "lr_at_edge": result.at_edge,
        "lrs_tried": len(result.tried),
        "highest_useful_lr": result.highest_useful_lr,
        "steps": result.curves[0].steps[-1],
    }
    rows = []
    for seed, curve in zip(seeds, result.curves, strict=True):
        row = {**known, "start_loss": curve.losses[0], "run_seed": seed}
        row |= {"dev_loss": _finite(curve.losses[-1]), **curve.test}
        rows.append(row | {f"dev_loss_{i}": _finite(curve.losses[i]) for i in range(1, len(curve.losses))})
    return [*rows, _mean(known, rows, baseline)]


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _mean(known: Row, rows: Sequence[Row], baseline: Result) -> Row:
    mean: Row = {**known, "run_seed": None, "runs": len(rows)}
    keys = ["dev_loss", "test_loss", "test_accuracy", *(f"dev_loss_{i}" for i in range(1, POINTS + 1))]
    for key in keys:
        if any(key in row for row in rows):
            values = [row.get(key) for row in rows]
            mean = spread(mean, [math.inf if v is None else v for v in values], key)
    mean["start_loss"] = sum(row["start_loss"] for row in rows) / len(rows)
    last = [math.inf if row["dev_loss"] is None else row["dev_loss"] for row in rows]
    return mean | difference(last, [curve.losses[-1] for curve in baseline.curves], "dev_loss")


def shown(row: Row) -> dict[str, str]:
    """What the terminal shows of a row."""

    def text(key: str, form: str = ".4f") -> str:
        if row.get(key) is None:
            return "diverged" if key == "dev_loss" else ""
        spread_ = row.get(f"{key}_sd")
        return f"{row[key]:{form}}" + ("" if spread_ is None else f" ± {spread_:{form}}")

    return {
        "seed": f"mean of {row['runs']}" if row["run_seed"] is None else str(row["run_seed"]),
        "lr": f"{row['lr']:.2e}" + (" (edge)" if row["lr_at_edge"] else ""),
        "loss before": f"{row['start_loss']:.4f}",
        "dev loss": text("dev_loss"),
        "test": text("test_accuracy", ".3f") or text("test_loss"),
        "against the first arm": interval(row, "dev_loss_difference", "+.4f"),
        "verdict": row.get("dev_loss_difference_verdict") or "",
    }


def interval(row: Row, key: str, form: str) -> str:
    """A mean with its interval, or nothing where there is none."""
    if row.get(f"{key}_low") is None:
        return ""
    return f"{row[key]:{form}} ({row[f'{key}_low']:{form}} to {row[f'{key}_high']:{form}})"
