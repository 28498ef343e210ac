"""Tables of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, milliseconds, spread
from ..bench.registry import Row
from ..bench.rows import good
from .cases import NORMALS, PUBLISHED


def signs(rows: Sequence[Row]) -> Table:
    """A line for each case with signs, against normals and against the published passes."""
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in good(rows):
        if row.get("distribution") == "rademacher" and row.get("ratio") is not None:
            cases.setdefault((row["case"], row["batch"], row["tokens"]), {})[row["baseline"]] = row
    lines = []
    for of in cases.values():
        row, published = of[NORMALS], of.get(PUBLISHED)
        several = f", {row['directions']} directions" if (row.get("directions") or 1) > 1 else ""
        method = row["method"] + several + (", in the forward" if row["perturb"] == "in_forward" else "")
        lines.append(
            [
                f"{row['shape']}, {row['batch']} × {row['tokens']}",
                method,
                milliseconds(row["seconds_median"]),
                f"{row['passes_share']:.1%}",
                milliseconds(row["baseline_seconds_median"]),
                f"{row['baseline_passes_share']:.1%}",
                spread(row, "ratio", ".2f"),
                "–" if published is None else spread(published, "ratio", ".2f"),
            ]
        )
    headings = ("ms", "of it passes", "with normals, ms", "of it passes", "normals / signs", "published / signs")
    return ("model, batch", "method", *headings), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {"signs-steps": signs}
