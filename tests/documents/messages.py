"""What the package says, so that a document which quotes it cannot go on quoting what is no longer said."""

from __future__ import annotations

import ast
import re
from pathlib import Path

GAP = "…"  # names and numbers, in a quote; values that are put into a text, in the source


def of_source(source: str) -> str:
    """All texts of a module, parted by line breaks; what is put into one is a gap."""
    found = []
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            found.append("".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def of_package(*folders: Path) -> list[str]:
    return [of_source(path.read_text()) for folder in folders for path in sorted(folder.rglob("*.py"))]


def quoted(document: str, column: str = "we say") -> list[str]:
    """The code in a column of the document's tables."""
    found: list[str] = []
    at = None
    for line in document.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if not line.startswith("|"):
            at = None
        elif column in cells:
            at = cells.index(column)
        elif at is not None:
            found += re.findall(r"`([^`]+)`", cells[at])
    return found


def is_said(quote: str, modules: list[str]) -> bool:
    """Whether one module has all of a quote's words, in order within each of its parts."""
    parts = [part.strip() for part in quote.split(GAP) if part.strip()]
    return bool(parts) and any(all(part in text for part in parts) for text in modules)
