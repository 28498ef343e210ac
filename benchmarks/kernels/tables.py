"""Tables of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, spread
from ..bench.registry import Row
from ..bench.rows import good

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def signs(rows: Sequence[Row]) -> Table:
    """A line for each kind of pass with signs and each of its baselines: the ratio of every dtype."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in good(rows):
        if row.get("distribution") == "rademacher" and row.get("ratio") is not None:
            found.setdefault((_pass(row), row["baseline"]), {})[row["dtype"]] = row
    lines, last = [], ""
    for (name, baseline), of in found.items():
        ratios = [spread(of[dtype], "ratio", ".2f") if dtype in of else "" for dtype in _DTYPES]
        lines.append(["" if name == last else name, baseline, *ratios])
        last = name
    return ("", "against", *_DTYPES.values()), lines


def _pass(row: Row) -> str:
    """What the pass does, in words."""
    k = row["directions"]
    words = ["one direction" if k == 1 else f"{k} directions"] if row["mask"] == "none" else [_MASKS[row["mask"]]]
    words += ["stochastic rounding"] * (row["rounding"] == "stochastic")
    words += [f"{row['dropped_share']:.0%} of the blocks dropped"] * bool(row["dropped_share"])
    words += [f"{row['threads']} threads"] * (row["threads"] not in (None, 1))
    instructions = row["backend"].partition(":")[2]
    return f"{instructions}, {row['elements'] / 2**20:g} Mi: {', '.join(words)}"


_MASKS = {
    "threshold": "a threshold",
    "bool": "a bool mask",
    "bits": "mask bits",
    "record": "a threshold, writing bits",
}
TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {"signs-passes": signs}
