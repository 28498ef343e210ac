"""Writes tables of committed rows into documents, between marks that name the table and the files of its rows.

A mark stands alone in its line: `<!-- table lezo-step of docs/results/claims-lezo.csv -->`, and the table ends at the
next `<!-- end -->`. The tables are functions in each suite's `tables.py`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .registry import Row
from .rows import read

ROOT = Path(__file__).parents[2]
Table = tuple[Sequence[str], list[list[str]]]  # headings and lines
_SUITES = ("kernels", "step", "exactness", "claims", "peers", "randomness", "gpu")
_BLOCK = re.compile(r"(<!-- table (\S+) of ([^>]+?) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def tables() -> dict[str, Callable[[Sequence[Row]], Table]]:
    """All tables by name."""
    modules = (importlib.import_module(f"benchmarks.{suite}.tables") for suite in _SUITES)
    return {name: table for module in modules for name, table in module.TABLES.items()}


def run(documents: Sequence[str], check: bool) -> int:
    """Bring the tables of the documents up to date, or only say which are out of date.

    Returns:
        The exit status: 1 if `check` found a table out of date, 2 if a table cannot be made, else 0.
    """
    status = 0
    for name in documents:
        path = Path(name)
        try:
            text = path.read_text()
            new = updated(text)
        except FileNotFoundError as error:
            print(f"{name}: there is no file {error.filename}", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        if new == text:
            print(f"{name}: up to date")
        elif check:
            print(f"{name}: out of date; python -m benchmarks evidence {name} writes its tables")
            status = 1
        else:
            path.write_text(new)
            print(f"{name}: written")
    return status


def updated(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: there is no mark, one names no table, or a table has no rows. FileNotFoundError: rows are missing.
    """
    known = tables()

    def block(found: re.Match[str]) -> str:
        start, name, files, _, end = found.groups()
        if name not in known:
            raise ValueError(f"expected a table of {', '.join(known)}, got {name!r}")
        headings, lines = known[name]([row for file in files.split(", ") for row in read(ROOT / file)])
        if not lines:
            raise ValueError(f"no rows for the table {name} in {files}")
        return f"{start}\n{_markdown(headings, lines)}\n{end}"

    new, marks = _BLOCK.subn(block, text)
    if not marks:
        raise ValueError("expected marks such as <!-- table NAME of FILE --> and <!-- end -->, found none")
    return new


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in (headings, ["---"] * len(headings), *lines))
    return "".join("| " + " | ".join(cells) + " |\n" for cells in escaped)


def number(row: Row, key: str, form: str) -> str:
    """A cell: the number, ± its standard deviation over the seeds if the row has one; a dash for None."""
    if row.get(key) is None:
        return "–"
    spread = row.get(f"{key}_sd")
    return f"{row[key]:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def interval(row: Row, key: str, form: str) -> str:
    """A cell: a mean with its 95 % interval; a dash for None."""
    if row.get(key) is None:
        return "–"
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return f"{row[key]:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def spread(row: Row, key: str, form: str) -> str:
    """A cell: a median with its 10th and 90th percentile."""
    return f"{row[key]:{form}} ({row[f'{key}_p10']:{form}}–{row[f'{key}_p90']:{form}})"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}"
