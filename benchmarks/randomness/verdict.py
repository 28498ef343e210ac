"""When a p-value is too small for chance, among so many of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.registry import Row, Target, judge

FAMILY = 0.001  # the chance that a perfect generator misses any bound of one case


def judged(rows: Sequence[Row], tests: int | None = None) -> list[Row]:
    """Rows with a `p_value`, each held to Bonferroni's bound for all of them.

    Args:
        rows: of one case.
        tests: how many p-values the case has, if not one a row.
    """
    target = Target("p_value", at_least=FAMILY / (tests or len(rows)))
    return [{**row, **judge(row, [target])} for row in rows]


def verdict(row: Row) -> str:
    """What the terminal says of a missed bound; nothing where there is none."""
    return f"missed {row['target']}" if row.get("target_met") is False else ""
