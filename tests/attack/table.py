"""The table of counts in docs/reliability.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_MARKED = re.compile(r"(<!-- attacks of docs/results/attack\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def of(found: dict[str, Any]) -> str:
    """A row for each attack."""
    lines = ["| attack | on | cases | findings | most memory taken |", "|---|---|--:|--:|--:|"]
    for name, row in found.items():
        grown = f"{row['grown_MiB']} MiB" if row.get("grown_MiB") else ""
        tally = ", ".join(f"{n:,} {what}" for what, n in row.get("tally", {}).items())
        cases = f"{row['cases']:,} ({tally})" if tally else f"{row['cases']:,}"
        lines.append(f"| `{name}` | {row['what']} | {cases} | {row['findings']} | {grown} |")
    return "\n".join(lines)


def updated(text: str, found: dict[str, Any]) -> str:
    """The document with the table of these counts."""
    return _MARKED.sub(lambda m: f"{m[1]}{of(found)}\n{m[2]}", text)


def write(results: Path) -> int:
    """Into the document; 1 if it has no place for it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if not _MARKED.search(text):
        print(f"{DOCUMENT}: expected the marks of a table, got none")
        return 1
    DOCUMENT.write_text(updated(text, json.loads(results.read_text())), encoding="utf-8")
    return 0
