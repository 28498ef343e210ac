"""Measured passes over sizes, beside a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bench.registry import Row


def choose(rows: Sequence[Row]) -> list[Row]:
    """Plain passes, once each."""
    found = {
        row["case"]: row
        for row in rows
        if row.get("gb_per_s") is not None
        and (row.get("mask"), row.get("directions"), row.get("rounding")) == ("none", 1, "nearest")
        and not row["dropped_share"]
        and row["threads"] in (None, 1)
    }
    return sorted(found.values(), key=lambda row: row["elements"])


def draw(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots()
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["device_name"], row["dtype"], row["backend"]), []).append(row)
    for i, ((_, dtype, backend), line) in enumerate(lines.items()):
        x = [row["elements"] for row in line]
        axes.plot(x, [row["gb_per_s"] for row in line], "o-", color=f"C{i}", label=f"{dtype}, {backend}")
        axes.plot(
            x, [row["copy_gb_per_s"] for row in line], ":", color=f"C{i}", label=f"copy beside {dtype}, {backend}"
        )
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s read and written")
    axes.set_title(f"Measured: plain passes on {', '.join(dict.fromkeys(row['device_name'] for row in rows))}")
    axes.legend(fontsize="x-small")
