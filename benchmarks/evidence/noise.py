"""Tables of the noise's statistics."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.registry import Row
from ..randomness.dieharder import ASSESSMENTS

_FEW = 0.001  # a p-value below which a result is told in bold


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row.get("experiment") == experiment and row.get("statistic") is not None]


def moments(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """Each statistic of all generators: what was found, and its p-value."""
    # The number of cells goes by the number of values.
    found = {(row["statistic"].partition(",")[0], row["generator"]): row for row in _of(rows, "moments")}
    generators = list(dict.fromkeys(generator for _, generator in found))
    counts = {g: next(row["values"] for (_, other), row in found.items() if other == g) for g in generators}
    lines = []
    for statistic in dict.fromkeys(statistic for statistic, _ in found):
        lines.append([f"`{statistic}`", *(_result(found.get((statistic, g))) for g in generators)])
    return ("", *(f"{g}, {counts[g]:.2g} values" for g in generators)), lines


def _result(row: Row | None) -> str:
    if row is None:
        return "–"
    text = f"{row['measured']:.4g}"
    if row["expected"]:
        text += f" of {row['expected']:.4g}"
    if row["p_value"] is None:
        return text
    p = f"p = {row['p_value']:.2g}"
    return f"{text}, " + (f"**{p}**" if row["p_value"] < _FEW else p)


def correlations(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """For each generator and kind of pairs the most extreme of its results."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in _of(rows, "correlations"):
        if row.get("z") is not None:
            kinds.setdefault((row["generator"], row["case"].rpartition("/")[2]), []).append(row)
    lines = []
    for (generator, kind), members in kinds.items():
        worst = max(members, key=lambda row: abs(row["z"]))
        results = sum(row["tests"] or 1 for row in members)
        name = "" if kind == generator else f", {kind}"
        lines.append([f"{generator}{name}", str(results), f"{worst['z']:+.2f}", worst["statistic"]])
    return ("generator", "results", "most extreme z", "which"), lines


def battery(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """For each stream of each generator how many of dieharder's results passed."""
    streams: dict[tuple[str, str], list[Row]] = {}
    for row in _of(rows, "battery"):
        if row.get("p_value") is not None and row["assessment"] in ASSESSMENTS:  # not that of all p-values together
            streams.setdefault((row["generator"], row["stream"]), []).append(row)
    lines = []
    for (generator, stream), members in streams.items():
        words = [str(row["assessment"]) for row in members]
        ends = [min(row["p_value"], 1 - row["p_value"]) for row in members]
        retried = sum(row["first_p_value"] != row["p_value"] for row in members)
        counts = [str(words.count(word)) for word in ASSESSMENTS]
        lines.append([generator, stream, str(len(members)), *counts, str(retried), f"{min(ends):.1g}"])
    return (
        "generator",
        "stream",
        "results",
        "passed",
        "weak",
        "failed",
        "of tests taken again",
        "p-value nearest to 0 or 1",
    ), lines
