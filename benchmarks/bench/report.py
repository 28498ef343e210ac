"""What a run prints. The rows hold everything that it knows; the table leaves most of it out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .registry import Row, verdicts

_QUIET = 0.95


def table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    print(title)
    for line in (headings, *lines):
        padded = (f"{text:{'>' if _is_number(text) else '<'}{w}}" for text, w in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())
    print(caption)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.,]+[%KMG]?", text) is not None


def show(suite: str, rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> None:
    """Print a table of the rows that ran, then what was wrong, then what was skipped and why.

    Args:
        suite: its name.
        rows: of one run.
        cells: of the suite: what its table shows of a row.
    """
    right = [row for row in rows if row.get("correct") is not False and row.get("skipped") is None]
    tables: dict[tuple[str, ...], list[Row]] = {}  # by headings: experiments of one suite may have different ones
    for row in right:
        tables.setdefault(tuple(shown(row, cells)), []).append(row)
    for alike in tables.values():
        _table(suite, alike, cells)
    if (share := _share_of_processor(right)) < _QUIET:
        print(
            f"This machine was busy: calls with one thread had a processor only {share:.0%} of the time. Trust the CPU "
            "ratio more than the ratio, or measure again when it is quiet."
        )
    if any(row.get("launch_dominates") for row in right):
        print("Some calls take longer to launch than to run on the GPU (small sizes): their time is that of launching.")
    skipped: dict[str, list[str]] = {}
    for row in rows:
        if row.get("correct") is False:
            print(f"WRONG {row['case']}: {row['wrong']}")
        if row.get("skipped") is not None:
            skipped.setdefault(row["skipped"], []).append(row["case"])
    for reason, cases in skipped.items():
        print(f"skipped, {reason}: {', '.join(cases)}")


def _share_of_processor(rows: Sequence[Row]) -> float:
    """The least share of its time for which a call with one thread had a processor; 1 if there is no such call."""
    shares = (
        row[f"{who}cpu_seconds_median"] / row[f"{who}seconds_median"]
        for row in rows
        for who in ("", "baseline_")
        if row.get("threads") == 1 and row.get(f"{who}cpu_seconds_median") is not None
    )
    return min(shares, default=1.0)


def _table(suite: str, rows: Sequence[Row], cells: Callable[[Row], dict[str, str]]) -> None:
    lines, before = [], None
    for row in rows:
        texts = shown(row, cells)
        # The rows of a case differ in the baseline alone: what comes before it is printed once.
        own = list(texts)[: list(texts).index("against") if "against" in texts else 1]
        lines.append(["" if row["case"] == before and h in own else text for h, text in texts.items()])
        before = row["case"]
    run = rows[0]
    machine = [f"{run['device_name']}, torch {run['torch_version']}"] if "device_name" in run else []
    commit = f"commit {(run['commit'] or 'unknown')[:12]}"
    caption = ", ".join([*machine, f"zo_kernels {run['zo_kernels_version']}", commit, run["date_utc"]])
    table(f"benchmarks {suite}", list(shown(run, cells)), lines, caption)


def shown(row: Row, cells: Callable[[Row], dict[str, str]]) -> dict[str, str]:
    """A row as a line of a table: heading -> text."""
    texts = {"case": row["case"]}
    if row.get("elements") is not None:
        texts["elements"] = _short(row["elements"])
    texts |= cells(row) | ({"correct": "yes"} if row.get("correct") else {})
    if row.get("baseline") is None:
        return texts
    return texts | {
        "against": row["baseline"] + ("" if row["ratio_of"] == "whole" else f" ({row['ratio_of']})"),
        "its ms": f"{row['baseline_seconds_median'] * 1e3:,.2f}",
        "ratio (p10 to p90)": f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})",
        "CPU ratio": "" if row.get("cpu_ratio") is None else f"{row['cpu_ratio']:.2f}",
        "target": ", ".join(f"{target} {'met' if met else 'missed'}" for target, met in verdicts(row)),
    }


def _short(count: int) -> str:
    """64M for 64 * 2**20, as the options take it; other numbers in full."""
    for suffix, unit in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if count % unit == 0:
            return f"{count // unit}{suffix}"
    return f"{count:,}"
