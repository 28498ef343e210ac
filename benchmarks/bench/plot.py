"""Draws figures of rows that suites have written; the columns tell which figure a row belongs to."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from .registry import Row
from .rows import read

DRAWINGS = {
    "roofline": "static.figure",
    "bandwidth": "kernels.figure",
    "step": "step.figure",
    "peers": "peers.figure",
    "share": "claims.figure_share",
    "learning": "claims.figure_learning",
    "forwards": "claims.fewer.figure",
    "svrg": "claims.svrg.figure",
    "tails": "randomness.figure",
}


class Drawing(Protocol):
    """A module that draws one figure."""

    def choose(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that the figure shows."""

    def draw(self, figure: Any, rows: list[Row]) -> None:
        """Draw them on a matplotlib Figure."""


def run(files: Sequence[str], out: str) -> int:
    """Draw every figure that the rows of the files allow, and say which ones they do not.

    Returns:
        The exit status: 2 if a file cannot be read or matplotlib is missing, else 0.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("plot: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
        return 2
    found: list[Row] = []
    for file in files:
        try:
            found += read(Path(file))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{file}: expected rows written with --json, or the CSV beside them: {reason}", file=sys.stderr)
            return 2
    without = []
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, module in DRAWINGS.items():
        drawing = cast(Drawing, importlib.import_module(f"benchmarks.{module}"))
        if chosen := drawing.choose(found):
            figure = Figure(figsize=(9, 5.5), layout="constrained")
            drawing.draw(figure, chosen)
            path = Path(out, f"{name}.png")
            figure.savefig(path, dpi=120)
            print(path)
        else:
            without.append(name)
    if without:
        print(f"no rows in these files for {', '.join(without)}")
    return 0
