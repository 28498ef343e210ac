"""Tables of MeZO-SVRG's claims."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.registry import Row
from .cells import interval

_Q = 5  # of the variances shown
_BUDGETS = ("steps", "queries", "time")
_METHODS = ("svrg-q2", "svrg-q5", "svrg-q10")


def _means(rows: Sequence[Row], *claims: str) -> list[Row]:
    return [r for r in rows if r.get("claim") in claims and r.get("runs") and r.get("correct")]


def variance(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    headings = ("place", "1 + S/∥∇f∥²", "shared directions", "expected", "separate directions", "expected")
    places: dict[str, dict[str, Row]] = {}
    for row in _means(rows, "svrg-variance"):
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


def runs(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    found = {(r["problem"], r["budget"], r["method"]): r for r in _means(rows, "svrg-least-squares", "svrg-mlp")}
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
