"""What a run shows on the terminal. Everything it knows is in the rows; the table leaves most of it out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .registry import Case, Row, verdicts

_WIDTH = 240  # of a file or a pipe
_QUIET = 0.95


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def names(cases: Sequence[Case], console: Console) -> None:
    for case in cases:
        reason = "" if case.skipped is None else f"  (skipped: {case.skipped})"
        console.print(case.name + reason, highlight=False, soft_wrap=True, markup=False)


def show(suite: str, rows: Sequence[Row], cells: Callable[[Row], dict[str, str]], console: Console) -> None:
    """The table of what ran, then what was wrong, then what was skipped."""
    right = [row for row in rows if row.get("correct")]
    if right:
        for alike in _by_headings(right, cells):
            console.print(_table(suite, alike, cells))
        if (share := _share_of_processor(right)) < _QUIET:
            console.print(
                f"This machine was busy: calls with one thread had a processor only {share:.0%} of the time, long ones "
                "less than short ones. Trust the CPU ratio more than the ratio, or measure again when it is quiet.",
                soft_wrap=True,
            )
    for row in rows:
        if row.get("correct") is False:
            console.print(f"[red]WRONG[/red] {escape(row['case'])}: {escape(row['wrong'])}", soft_wrap=True)
    skipped: dict[str, list[str]] = {}
    for row in rows:
        if row.get("skipped") is not None:
            skipped.setdefault(row["skipped"], []).append(row["case"])
    for reason, cases in skipped.items():
        console.print(f"skipped, {reason}: {', '.join(cases)}", markup=False, highlight=False, soft_wrap=True)


def _share_of_processor(rows: Sequence[Row]) -> float:
    """The least share of its time that a call with one thread was running; 1 if there is none."""
    return min(
        (
            row[f"{who}cpu_seconds_median"] / row[f"{who}seconds_median"]
            for row in rows
            for who in ("", "baseline_")
            if row["threads"] == 1 and row.get(f"{who}cpu_seconds_median") is not None
        ),
        default=1.0,
    )


def _by_headings(rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> list[list[Row]]:
    """Rows that fit in one table, those of one suite's experiment for instance."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(tuple(_shown(row, cells(row))), []).append(row)
    return list(tables.values())


def _table(suite: str, rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> Table:
    first = rows[0]
    caption = (
        f"{first['device_name']}, torch {first['torch_version']}, zo_kernels {first['zo_kernels_version']}, "
        f"commit {(first['commit'] or 'unknown')[:12]}, {first['date_utc']}"
    )
    table = Table(title=f"benchmarks {suite}", caption=escape(caption), box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [_shown(row, cells(row)) for row in rows]
    for heading in shown[0]:
        left = heading in ("case", "against", "target")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    before = None
    for row in shown:
        # What is the case's own stands in its first row only; the rows below it differ in the baseline.
        repeated = row["case"] == before
        own = list(row)[: list(row).index("against") if "against" in row else 1]
        table.add_row(*("" if repeated and heading in own else text for heading, text in row.items()))
        before = row["case"]
    return table


def _shown(row: Row, own: dict[str, str]) -> dict[str, str]:
    shown = {"case": escape(row["case"])}
    if row.get("elements") is not None:
        shown["elements"] = _short(row["elements"])
    shown |= {**own, "correct": "yes"}
    if row.get("baseline") is None:
        return shown
    return shown | {
        "against": escape(row["baseline"]) + ("" if row["ratio_of"] == "whole" else f" ({row['ratio_of']})"),
        "its ms": f"{row['baseline_seconds_median'] * 1e3:,.2f}",
        "ratio (p10 to p90)": f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})",
        "CPU ratio": "" if row.get("cpu_ratio") is None else f"{row['cpu_ratio']:.2f}",
        "target": _target(row) if row.get("target") else "",
    }


def _short(count: int) -> str:
    """64M for 64 * 2**20, as the options take it; other numbers in full."""
    for suffix, unit in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count % unit == 0:
            return f"{count // unit}{suffix}"
    return f"{count:,}"


def _target(row: Row) -> str:
    words = {True: "[green]met[/green]", False: "[red]missed[/red]"}
    return "\n".join(f"{escape(target)} {words[met]}" for target, met in verdicts(row))
