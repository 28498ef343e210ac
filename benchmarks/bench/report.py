"""What a run shows on the terminal. Everything it knows is in the rows; the table leaves most of it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .registry import Case, Row, verdicts
from .terminal import Terminal

_QUIET = 0.95


def names(cases: Sequence[Case], terminal: Terminal) -> None:
    for case in cases:
        reason = case.reason_to_skip()
        terminal.line(case.name + ("" if reason is None else f"  (skipped: {reason})"))


def show(suite: str, rows: Sequence[Row], cells: Callable[[Row], dict[str, str]], terminal: Terminal) -> None:
    """The table of what ran, then what was wrong, then what was skipped."""
    right = [row for row in rows if row.get("correct") is not False and row.get("skipped") is None]
    if right:
        for alike in _by_headings(right, cells):
            _table(suite, alike, cells, terminal)
        if (share := _share_of_processor(right)) < _QUIET:
            terminal.line(
                f"This machine was busy: calls with one thread had a processor only {share:.0%} of the time, long ones "
                "less than short ones. Trust the CPU ratio more than the ratio, or measure again when it is quiet."
            )
        if any(row.get("launch_dominates") for row in right):
            terminal.line("Where launching takes longer than the GPU does, the small sizes, time is that of launching.")
    for row in rows:
        if row.get("correct") is False:
            terminal.wrong(row["case"], row["wrong"])
    skipped: dict[str, list[str]] = {}
    for row in rows:
        if row.get("skipped") is not None:
            skipped.setdefault(row["skipped"], []).append(row["case"])
    for reason, cases in skipped.items():
        terminal.line(f"skipped, {reason}: {', '.join(cases)}")


def _share_of_processor(rows: Sequence[Row]) -> float:
    """The least share of its time that a call with one thread was running; 1 if there is none."""
    return min(
        (
            row[f"{who}cpu_seconds_median"] / row[f"{who}seconds_median"]
            for row in rows
            for who in ("", "baseline_")
            if row.get("threads") == 1 and row.get(f"{who}cpu_seconds_median") is not None
        ),
        default=1.0,
    )


def _by_headings(rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> list[list[Row]]:
    """Rows that fit in one table, those of one suite's experiment for instance."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(tuple(_shown(row, cells(row))), []).append(row)
    return list(tables.values())


def _table(suite: str, rows: Sequence[Row], cells: Callable[[Row], dict[str, str]], terminal: Terminal) -> None:
    first = rows[0]
    machine = [f"{first['device_name']}, torch {first['torch_version']}"] if "device_name" in first else []
    caption = ", ".join(
        [
            *machine,
            f"zo_kernels {first['zo_kernels_version']}",
            f"commit {(first['commit'] or 'unknown')[:12]}",
            first["date_utc"],
        ]
    )
    shown = [_shown(row, cells(row)) for row in rows]
    texts, before = [], None
    for row in shown:
        # What is the case's own stands in its first row only; the rows below it differ in the baseline.
        repeated = row["case"] == before
        own = list(row)[: list(row).index("against") if "against" in row else 1]
        texts.append(["" if repeated and heading in own else text for heading, text in row.items()])
        before = row["case"]
    terminal.table(f"benchmarks {suite}", caption, list(shown[0]), texts)


def _shown(row: Row, own: dict[str, str]) -> dict[str, str]:
    shown = {"case": row["case"]}
    if row.get("elements") is not None:
        shown["elements"] = _short(row["elements"])
    shown |= {**own, "correct": "yes"} if row.get("correct") else own
    if row.get("baseline") is None:
        return shown
    return shown | {
        "against": row["baseline"] + ("" if row["ratio_of"] == "whole" else f" ({row['ratio_of']})"),
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
    return "\n".join(f"{target} {'met' if met else 'missed'}" for target, met in verdicts(row))
