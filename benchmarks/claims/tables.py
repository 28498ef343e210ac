"""Tables of the claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, interval, milliseconds, number
from ..bench.registry import Row
from .fewer import tables as fewer
from .steps import OURS, PUBLISHED, PUBLISHED_DENSE

_BOTH = ("published", "ours")
_BY_TIME = ("time to equal loss, published", "ours", "loss at equal time, published", "ours")
_BUDGETS = ("steps", "queries", "time")
_QS = (2, 5, 10)


def _chosen(rows: Sequence[Row], experiment: str | None, *claims: str) -> list[Row]:
    """Rows of steps, or means over the seeds."""
    found = [row for row in rows if row.get("claim") in claims and row.get("correct")]
    return [row for row in found if row.get("experiment") == experiment and (experiment == "step" or row.get("runs"))]


def passes(rows: Sequence[Row]) -> Table:
    headings = ("examples × tokens", "published, ms", "of it not forwards", "ours, ms", "of it not forwards", "ratio")
    return headings, [
        [
            f"{row['batch']} × {row['tokens']}",
            milliseconds(row["baseline_seconds_median"]),
            f"{1 - row['baseline_forwards_share']:.0%}",
            milliseconds(row["seconds_median"]),
            f"{1 - row['forwards_share']:.0%}",
            f"{row['ratio']:.1f} ({row['ratio_p10']:.1f} to {row['ratio_p90']:.1f})",
        ]
        for row in _chosen(rows, "step", "perturbation-dominates")
    ]


def lezo_step(rows: Sequence[Row]) -> Table:
    names = "published: MeZO / LeZO", "ours: MeZO / LeZO", "published MeZO / our MeZO", "published LeZO / our LeZO"
    cases: dict[str, dict[str, Row]] = {}
    for row in _chosen(rows, "step", "lezo"):
        cases.setdefault(row["case"], {})[row["baseline"]] = row
    lines = []
    for case in cases.values():
        dense, own, published = (case[baseline]["ratio"] for baseline in (OURS, PUBLISHED, PUBLISHED_DENSE))
        row, ratios = case[OURS], (published / own, dense, published / dense, own)
        which = [f"{row['shape']}, {row['batch']} × {row['tokens']}", f"{row['drop']:.0%}"]
        lines.append([*which, *(f"{ratio:.2f}" for ratio in ratios)])
    return ("model, batch", "dropped", *names), lines


def _learned(rows: Sequence[Row], claim: str, *headings: str, more: Callable[[Row], list[str]]) -> Table:
    """A line for the mean of each arm: the task, the arm, its rate, its losses and how they differ; and more."""
    lines = []
    for row in _chosen(rows, "learning", claim):
        lr = f"{row['lr']:.1e}" + (" (edge of those tried)" if row["lr_at_edge"] else "")
        losses = f"{row['start_loss']:.3f} → {number(row, 'dev_loss', '.3f')}"
        difference = "–" if row["arm"].startswith("MeZO") else interval(row, "dev_loss_difference", "+.3f")
        lines.append([row["task"], row["arm"], lr, losses, difference, *more(row)])
    return ("task", headings[0], "lr", "dev loss", *headings[1:]), lines


def _by_time(row: Row) -> list[str]:
    """Against MeZO: the time until both have a loss, and the losses at a time."""
    to_loss = [interval(row, f"{whose}_time_to_loss_ratio", ".2f") for whose in _BOTH]
    return [*to_loss, *(interval(row, f"{whose}_equal_time_difference", "+.3f") for whose in _BOTH)]


def lezo(rows: Sequence[Row]) -> Table:
    return _learned(rows, "lezo", "method", "minus MeZO's", *_BY_TIME, more=_by_time)


def sparse(rows: Sequence[Row]) -> Table:
    def more(row: Row) -> list[str]:
        return [number(row, "highest_useful_lr", ".1e"), *_by_time(row)]

    headings = ("weights that take part", "minus MeZO's", "highest useful lr", *_BY_TIME)
    return _learned(rows, "sparse-mezo", *headings, more=more)


def sixteen(rows: Sequence[Row]) -> Table:
    return _learned(rows, "16-bits", "way", "minus fp32's", more=lambda row: [])


def rademacher(rows: Sequence[Row]) -> Table:
    def more(row: Row) -> list[str]:
        return [row["dev_loss_difference_verdict"] if row["distribution"] == "rademacher" else "–"]

    return _learned(rows, "rademacher", "way", "minus normals'", "lower loss", more=more)


def variance(rows: Sequence[Row]) -> Table:
    """A line for each place: the variance along normals and along signs, in units of ∥∇f∥², and their ratio."""
    places: dict[str, dict[str, Row]] = {}
    for row in _chosen(rows, "variance", "rademacher-variance"):
        places.setdefault(row["place"], {})[row["distribution"]] = row
    lines = []
    for place, of in places.items():
        both = of["normal"], of["rademacher"]
        measured = [text for row in both for text in (interval(row, "variance", ",.4g"), f"{row['expected']:,.0f}")]
        ratio, expected = interval(both[1], "to_normal_ratio", ".3f"), both[1]["expected"] / both[0]["expected"]
        lines.append([place, f"{both[0]['elements']:,}", *measured, ratio, f"{expected:.3f}"])
    found = ("normals", "d + 1", "signs", "d − 1", "signs / normals", "expected")
    return ("function", "weights", *found), lines


def svrg_variance(rows: Sequence[Row]) -> Table:
    places: dict[str, dict[str, Row]] = {}
    for row in _chosen(rows, None, "svrg-variance"):
        places.setdefault(row["place"], {})[row["directions"]] = row
    lines = []
    for place, of in places.items():
        pair = [of[directions] for directions in ("shared", "separate")]
        ratios = [(interval(row, "to_mezo_ratio", ".2g"), f"{row['expected_ratio']:.2g}") for row in pair]
        lines.append([place, f"{pair[0]['full_batch_worth']:.2g}", *ratios[0], *ratios[1]])
    return ("place", "1 + S/∥∇f∥²", "shared directions", "expected", "separate directions", "expected"), lines


def svrg_runs(rows: Sequence[Row]) -> Table:
    means = _chosen(rows, None, "svrg-least-squares", "svrg-mlp")
    found = {(row["problem"], row["budget"], row["method"]): row for row in means}
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in means):
        for budget in _BUDGETS:
            if all(of := [found.get((problem, budget, f"svrg-q{q}")) for q in _QS]):
                judged = [
                    f"{interval(row, 'to_mezo_ratio', '.2f')} {row['to_mezo_verdict'] or ''}".strip() for row in of
                ]
                lines.append([problem, f"equal {budget}", *judged])
    return ("problem", "at", *(f"q = {q}" for q in _QS)), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "passes": passes,
    "lezo-step": lezo_step,
    "lezo": lezo,
    "sparse-mezo": sparse,
    "16-bits": sixteen,
    "rademacher": rademacher,
    "rademacher-variance": variance,
    "svrg-variance": svrg_variance,
    "svrg-runs": svrg_runs,
    **fewer.TABLES,
}
