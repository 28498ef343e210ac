"""Where a run shows what it found: on rich's console, or as plain text where rich is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

_WIDTH = 240  # of a file or a pipe
_LEFT = ("case", "against", "target", "GPU", "bound", "operation", "stage", "status", "headline", "command")


class Terminal(Protocol):
    def line(self, text: str) -> None: ...

    def wrong(self, case: str, text: str) -> None: ...

    def table(self, title: str, caption: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None: ...

    def status(self, text: str) -> AbstractContextManager[Any]:
        """Shows what is being done, for as long as it is done."""


class Plain:
    def line(self, text: str) -> None:
        print(text)

    def wrong(self, case: str, text: str) -> None:
        print(f"WRONG {case}: {text}")

    def table(self, title: str, caption: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        lines = [part for row in cells for part in _split(row)]
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        print(title)
        for row in (headings, *lines):
            padded = (
                text.ljust(width) if heading in _LEFT else text.rjust(width)
                for heading, text, width in zip(headings, row, widths, strict=True)
            )
            print("  ".join(padded).rstrip())
        print(caption)

    def status(self, text: str) -> AbstractContextManager[Any]:
        return nullcontext(print(text, file=sys.stderr, flush=True))


def _split(row: Sequence[str]) -> list[list[str]]:
    """A row whose cells may have several lines, as rows of one line."""
    cells = [text.split("\n") for text in row]
    return [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(max(map(len, cells)))]


class Rich:
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(width=None if sys.stdout.isatty() else _WIDTH)

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def wrong(self, case: str, text: str) -> None:
        from rich.markup import escape

        self._console.print(f"[red]WRONG[/red] {escape(case)}: {escape(text)}", soft_wrap=True)

    def table(self, title: str, caption: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(title), caption=escape(caption), box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in headings:
            table.add_column(escape(heading), justify="left" if heading in _LEFT else "right", no_wrap=True)
        for row in cells:
            texts = (escape(text) for text in row)
            table.add_row(
                *(_coloured(text) if h == "target" else text for h, text in zip(headings, texts, strict=True))
            )
        self._console.print(table)

    def status(self, text: str) -> AbstractContextManager[Any]:
        from rich.markup import escape

        if not self._console.is_terminal:
            print(text, file=sys.stderr, flush=True)
        return self._console.status(escape(text))


def _coloured(targets: str) -> str:
    colours = {"met": "green", "missed": "red"}
    lines = (line.rpartition(" ") for line in targets.splitlines())
    return "\n".join(f"{target} [{colours[word]}]{word}[/]" for target, _, word in lines)


def terminal() -> Terminal:
    if importlib.util.find_spec("rich") is not None:
        return Rich()
    plain = Plain()
    plain.line("rich is not installed: tables are plain text")
    return plain
