"""How numbers stand in the tables."""

from __future__ import annotations

from ..bench.registry import Row


def number(row: Row, key: str, form: str) -> str:
    """With its standard deviation over the seeds, if the row has one; a dash for None."""
    if row.get(key) is None:
        return "–"
    spread = row.get(f"{key}_sd")
    return f"{row[key]:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def interval(row: Row, key: str, form: str) -> str:
    """A mean with its 95 % interval."""
    if row.get(key) is None:
        return "–"
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return f"{row[key]:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}"
