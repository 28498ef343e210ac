"""Figures drawn from rows that the suites have written; each suite's rows are known by their columns."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from .registry import Row
from .terminal import Plain

DRAWINGS = {
    "roofline": "static.figure",
    "bandwidth": "kernels.figure",
    "step": "step.figure",
    "peers": "peers.figure",
    "share": "claims.figure_share",
    "learning": "claims.figure_learning",
    "svrg": "claims.svrg.figure",
    "tails": "randomness.figure",
}
_WORDS: dict[str, Any] = {"": None, "True": True, "False": False}


class Drawing(Protocol):
    """A module that draws one figure."""

    HEADINGS: Sequence[str]  # columns of what it shows, where it has to be text

    def choose(self, rows: Sequence[Row]) -> list[Row]:
        """What it can show of the rows."""

    def draw(self, figure: Any, rows: list[Row]) -> None:
        """On a matplotlib Figure."""


def run(files: Sequence[str], out: str) -> int:
    """Draw what the rows of the files allow, and say what they do not.

    Returns:
        The exit status: 2 if a file cannot be read, else 0.
    """
    rows: list[Row] = []
    for file in files:
        try:
            rows += read(Path(file))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{file}: expected rows written with --json, or the CSV beside them: {reason}", file=sys.stderr)
            return 2
    without = []
    for name, module in DRAWINGS.items():
        drawing = cast(Drawing, importlib.import_module(f"benchmarks.{module}"))
        chosen = drawing.choose(rows)
        if not chosen:
            without.append(name)
        elif importlib.util.find_spec("matplotlib") is None:
            print(f"{name}: matplotlib is not installed, so this is a table instead of a figure")
            _as_text(name, drawing.HEADINGS, chosen)
        else:
            print(_drawn(drawing, chosen, Path(out, f"{name}.png")))
    if without:
        print(f"no rows in these files for {', '.join(without)}")
    return 0


def read(path: Path) -> list[Row]:
    """Rows of a JSON file or of the CSV beside it; what is empty there is None.

    Raises:
        OSError, ValueError: there is no such file, or it holds no rows.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)
    if path.suffix == ".csv":
        rows = [{key: _value(text) for key, text in row.items()} for row in rows]
    if not all(isinstance(row, dict) and "case" in row for row in rows):
        raise ValueError("rows without a case")
    return rows


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _drawn(drawing: Drawing, rows: list[Row], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    drawing.draw(figure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _as_text(name: str, headings: Sequence[str], rows: list[Row]) -> None:
    Plain().table(name, "", headings, [[_text(row.get(heading)) for heading in headings] for row in rows])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
