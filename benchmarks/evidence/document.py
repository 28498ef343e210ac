"""Writes tables into documents, between marks that say which table and of which rows.

A mark stands alone in its line: `<!-- table lezo-step of docs/results/claims-lezo.csv -->`, and the table ends at the
next `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..bench.rows import read
from .tables import TABLES

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- table (\S+) of ([^>]+?) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def run(documents: Sequence[str], check: bool) -> int:
    """Bring the tables of the documents up to date, or only say which are not.

    Returns:
        The exit status: 1 if a table was out of date and is only checked, 2 if one cannot be made, else 0.
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

    def block(found: re.Match[str]) -> str:
        start, name, files, _, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"expected a table of {', '.join(TABLES)}, got {name!r}")
        rows = [row for file in files.split(", ") for row in read(ROOT / file)]
        headings, lines = TABLES[name](rows)
        if not lines:
            raise ValueError(f"no rows for the table {name} in {files}")
        return f"{start}\n{_markdown(headings, lines)}\n{end}"

    new, marks = _BLOCK.subn(block, text)
    if not marks:
        raise ValueError("expected marks such as <!-- table NAME of FILE --> and <!-- end -->, found none")
    return new


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(headings)
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in (headings, ruler, *lines))
    return "".join("| " + " | ".join(cells) + " |\n" for cells in escaped)
