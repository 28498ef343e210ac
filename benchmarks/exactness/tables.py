"""Tables of replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, spread
from ..bench.registry import Row
from ..bench.rows import good


def signs(rows: Sequence[Row]) -> Table:
    """A line for each run along signs: the replay of all of it, and pairs with one along normals."""
    cases: dict[str, dict[str, Row]] = {}
    for row in good(rows):
        if row.get("distribution") == "rademacher":
            cases.setdefault(row["case"], {})[row["baseline"]] = row
    lines = []
    for of in cases.values():
        whole, pairs = of["training"], of["normals"]
        lines.append(
            [
                f"{whole['dtype']}, {whole['perturb'].replace('_', ' ')}",
                f"{whole['steps']:,}",
                f"{whole['replay_seconds']:,.1f}",
                f"{whole['ratio']:.0f}",
                f"{1e3 * pairs['seconds_median']:.2f}",
                f"{1e3 * pairs['baseline_seconds_median']:.2f}",
                spread(pairs, "ratio", ".1f"),
            ]
        )
    pairs = ("ms a step, in pairs", "with normals", "normals / signs")
    return ("run", "steps", "replayed in s", "training / replay", *pairs), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {"signs-replay": signs}
