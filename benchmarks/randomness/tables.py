"""Tables of the noise's statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table
from ..bench.registry import Row
from .battery import ASSESSMENTS

_FEW = 0.001  # a smaller p-value is shown in bold


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row.get("experiment") == experiment and row.get("statistic") is not None]


def _grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def moments(rows: Sequence[Row]) -> Table:
    """A line for each statistic: of every generator what was found, and its p-value."""
    # The chi-square's number of cells, after a comma, depends on the number of values.
    found = {(row["statistic"].partition(",")[0], row["generator"]): row for row in _of(rows, "moments")}
    values = {row["generator"]: row["values"] for row in found.values()}
    lines = [
        [f"`{statistic}`", *(_result(found.get((statistic, generator))) for generator in values)]
        for statistic in dict.fromkeys(statistic for statistic, _ in found)
    ]
    return ("", *(f"{generator}, {count:.2g} values" for generator, count in values.items())), lines


def _result(row: Row | None) -> str:
    if row is None:
        return "–"
    text = f"{row['measured']:.4g}"
    if row["expected"]:
        text += f" of {row['expected']:.4g}"
    if row["p_value"] is None:
        return text
    return f"{text}, {_p_value(row['p_value'], 'p = ')}"


def _p_value(p: float, before: str = "") -> str:
    text = f"{before}{p:.2g}"
    return f"**{text}**" if p < _FEW else text


def correlations(rows: Sequence[Row]) -> Table:
    """A line for each generator: the most extreme of its results."""
    lines = []
    for (generator,), members in _grouped(_of(rows, "correlations"), "generator").items():
        worst = max(members, key=lambda row: abs(row["z"]))
        results = sum(row["tests"] for row in members)
        lines.append([generator, str(results), f"{worst['z']:+.2f}", worst["statistic"]])
    return ("generator", "results", "most extreme z", "which"), lines


def signs(rows: Sequence[Row]) -> Table:
    """A line for each statistic of random signs and of their roundings."""
    lines = []
    for row in _of(rows, "signs"):
        if row.get("z") is not None:
            found = f"z = {row['z']:+.2f}"
        else:
            found = f"{row['measured']:,.0f} of {row['expected']:,.0f}"
        lines.append([row["statistic"], str(row["tests"]), f"{row['pairs']:.2g}", found, _p_value(row["p_value"])])
    return ("statistic", "results", "of", "found", "p"), lines


def battery(rows: Sequence[Row]) -> Table:
    """A line for each stream of words: how many of dieharder's results passed."""
    results = [row for row in _of(rows, "battery") if row["assessment"] in ASSESSMENTS]
    lines = []
    for (generator, stream), members in _grouped(results, "generator", "stream").items():
        counts = [str(sum(row["assessment"] == word for row in members)) for word in ASSESSMENTS]
        retried = sum(row["first_p_value"] != row["p_value"] for row in members)
        nearest = min(min(row["p_value"], 1 - row["p_value"]) for row in members)
        lines.append([generator, stream, str(len(members)), *counts, str(retried), f"{nearest:.1g}"])
    counted = ("results", "passed", "weak", "failed", "of tests taken again", "p-value nearest to 0 or 1")
    return ("generator", "stream", *counted), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "moments": moments,
    "signs": signs,
    "correlations": correlations,
    "battery": battery,
}
