"""Tables of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, spread
from ..bench.registry import Row
from ..bench.rows import good

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def signs(rows: Sequence[Row]) -> Table:
    """A line for each pass with signs: its time, and how many times as long each of its baselines takes."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in good(rows):
        if row.get("distribution") == "rademacher" and row.get("ratio") is not None:
            cases.setdefault((_pass(row), _DTYPES[row["dtype"]]), {})[row["baseline"]] = row
    lines = []
    for which, of in cases.items():
        first = next(iter(of.values()))
        ns = f"{1e9 * first['seconds_median'] / first['elements']:.3f}"
        lines.append([*which, ns, *("" if name not in of else spread(of[name], "ratio", ".2f") for name in _AGAINST)])
    passes = list(dict.fromkeys(name for name, _ in cases))
    lines.sort(key=lambda line: passes.index(line[0]))  # the dtypes of a pass together
    headings = ("in-place stream", "normals", "without mask", "rounded to nearest", "eager", "with `randint`")
    return ("pass", "", "ns an element", *headings), lines


_AGAINST = ("in-place stream", "normals", "unmasked", "nearest", "eager", "published MeZO with randint")


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
