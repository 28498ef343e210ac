"""Tables of the claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, interval, milliseconds, number
from ..bench.registry import Row
from .step_times import OURS, PUBLISHED, PUBLISHED_DENSE


def _steps(rows: Sequence[Row], claim: str) -> list[dict[str, Row]]:
    """For each case its rows by what they are against."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("claim") == claim and row.get("experiment") == "step" and row.get("correct"):
            cases.setdefault(row["case"], {})[row["baseline"]] = row
    return list(cases.values())


def _means(rows: Sequence[Row], claim: str) -> list[Row]:
    return [r for r in rows if r.get("claim") == claim and r.get("experiment") == "learning" and r.get("runs")]


def passes(rows: Sequence[Row]) -> Table:
    headings = ("examples × tokens", "published, ms", "of it not forwards", "ours, ms", "of it not forwards", "ratio")
    lines = []
    for case in _steps(rows, "perturbation-dominates"):
        row = case[PUBLISHED]
        lines.append(
            [
                f"{row['batch']} × {row['tokens']}",
                milliseconds(row["baseline_seconds_median"]),
                f"{1 - row['baseline_forwards_share']:.0%}",
                milliseconds(row["seconds_median"]),
                f"{1 - row['forwards_share']:.0%}",
                f"{row['ratio']:.1f} ({row['ratio_p10']:.1f} to {row['ratio_p90']:.1f})",
            ]
        )
    return headings, lines


def lezo_step(rows: Sequence[Row]) -> Table:
    headings = (
        "model, batch",
        "dropped",
        "published: MeZO / LeZO",
        "ours: MeZO / LeZO",
        "published MeZO / our MeZO",
        "published LeZO / our LeZO",
    )
    lines = []
    for case in _steps(rows, "lezo"):
        dense, own, published = case[OURS]["ratio"], case[PUBLISHED]["ratio"], case[PUBLISHED_DENSE]["ratio"]
        row = case[OURS]
        lines.append(
            [
                f"{row['shape']}, {row['batch']} × {row['tokens']}",
                f"{row['drop']:.0%}",
                f"{published / own:.2f}",
                f"{dense:.2f}",
                f"{published / dense:.2f}",
                f"{own:.2f}",
            ]
        )
    return headings, lines


_BY_TIME = ("time to equal loss, published", "ours", "loss at equal time, published", "ours")


def lezo(rows: Sequence[Row]) -> Table:
    lines = [[*line, *_by_time(row)] for row, line in _learned(rows, "lezo", "MeZO")]
    return ("task", "method", "lr", "dev loss", "minus MeZO's", *_BY_TIME), lines


def _by_time(row: Row) -> list[str]:
    """Against MeZO: the time until both have a loss, and the losses at a time."""
    both = ("published", "ours")
    to_loss = [interval(row, f"{whose}_time_to_loss_ratio", ".2f") for whose in both]
    return [*to_loss, *(interval(row, f"{whose}_equal_time_difference", "+.3f") for whose in both)]


def _task(row: Row) -> list[str]:
    lr = f"{row['lr']:.1e}" + (" (edge of those tried)" if row["lr_at_edge"] else "")
    return [row["task"], row["arm"], lr, f"{row['start_loss']:.3f} → {number(row, 'dev_loss', '.3f')}"]


def _learned(rows: Sequence[Row], claim: str, first: str) -> list[tuple[Row, list[str]]]:
    """The mean of each arm, and the cells about its learning."""
    return [
        (row, [*_task(row), interval(row, "dev_loss_difference", "+.3f") if row["arm"] != first else "–"])
        for row in _means(rows, claim)
    ]


def sparse(rows: Sequence[Row]) -> Table:
    found = _learned(rows, "sparse-mezo", "MeZO")
    lines = [[*line, number(row, "highest_useful_lr", ".1e"), *_by_time(row)] for row, line in found]
    headings = ("task", "weights that take part", "lr", "dev loss", "minus MeZO's", "highest useful lr", *_BY_TIME)
    return headings, lines


def sixteen(rows: Sequence[Row]) -> Table:
    return ("task", "way", "lr", "dev loss", "minus fp32's"), [line for _, line in _learned(rows, "16-bits", "MeZO")]


_Q = 5  # of the variances shown
_BUDGETS = ("steps", "queries", "time")
_METHODS = ("svrg-q2", "svrg-q5", "svrg-q10")


def _right_means(rows: Sequence[Row], *claims: str) -> list[Row]:
    return [r for r in rows if r.get("claim") in claims and r.get("runs") and r.get("correct")]


def svrg_variance(rows: Sequence[Row]) -> Table:
    headings = ("place", "1 + S/∥∇f∥²", "shared directions", "expected", "separate directions", "expected")
    places: dict[str, dict[str, Row]] = {}
    for row in _right_means(rows, "svrg-variance"):
        if row["anchor_every"] == _Q:
            places.setdefault(row["place"], {})[row["directions"]] = row
    return headings, [
        [
            place,
            f"{of['shared']['full_batch_worth']:.2g}",
            *(
                text
                for which in ("shared", "separate")
                for text in (interval(of[which], "to_mezo_ratio", ".2g"), f"{of[which]['expected_ratio']:.2g}")
            ),
        ]
        for place, of in places.items()
        if {"shared", "separate"} <= set(of)
    ]


def svrg_runs(rows: Sequence[Row]) -> Table:
    found = {(r["problem"], r["budget"], r["method"]): r for r in _right_means(rows, "svrg-least-squares", "svrg-mlp")}
    lines = []
    for problem in dict.fromkeys(key[0] for key in found):
        for budget in _BUDGETS:
            cells = [found.get((problem, budget, method)) for method in _METHODS]
            if all(cells):
                lines.append([problem, f"equal {budget}", *(_judged(cell) for cell in cells if cell)])
    return ("problem", "at", *(f"q = {m.removeprefix('svrg-q')}" for m in _METHODS)), lines


def _judged(row: Row) -> str:
    verdict = row.get("to_mezo_verdict")
    return interval(row, "to_mezo_ratio", ".2f") + ("" if verdict is None else f" {verdict}")


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "passes": passes,
    "lezo-step": lezo_step,
    "lezo": lezo,
    "sparse-mezo": sparse,
    "16-bits": sixteen,
    "svrg-variance": svrg_variance,
    "svrg-runs": svrg_runs,
}
