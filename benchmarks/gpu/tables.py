"""Tables of the page about a GPU: rows -> headings and lines.

What a stage measured stands there as its suite prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..bench import registry, report
from ..bench.document import Table
from ..bench.registry import Row
from ..bench.rows import good


def _suite(name: str, rows: Sequence[Row]) -> Table:
    cells = registry.suite(name).cells
    lines = [report.shown(row, cells) for row in good(rows)]
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    return headings, [[line.get(heading, "") for heading in headings] for line in lines]


def _machine(rows: Sequence[Row]) -> Table:
    hidden = ("case", "device", "correct")
    told = {key: value for row in good(rows) for key, value in row.items() if value is not None and key not in hidden}
    return ("", ""), [[key.replace("_", " "), str(value)] for key, value in told.items()]


def _stages(rows: Sequence[Row]) -> Table:
    shown = ("status", "seconds", "limit_seconds", "told")
    lines = [[row["case"], *("" if row[key] is None else str(row[key]) for key in shown)] for row in rows]
    return ("stage", "", "seconds", "limit", "what it found, or why it did not"), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    **{f"gpu-{name}": partial(_suite, name) for name in registry.SUITES},
    "gpu-machine": _machine,
    "gpu-stages": _stages,
}
