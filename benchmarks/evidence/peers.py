"""Tables of other packages' steps."""

from __future__ import annotations

from collections.abc import Sequence

from ..registry import Row
from .cells import milliseconds, number


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row.get("experiment") == experiment and row.get("correct")]


def _named(row: Row) -> str:
    version = "" if row["peer_version"] is None else f" {row['peer_version']}"
    return f"{row.get('baseline') or row['peer']}{version}"


def steps(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    headings = (
        "model, batch",
        "package",
        "its ms",
        "our ms",
        "ratio (p10 to p90)",
        "of processor time",
        "its extra MiB",
        "our extra MiB",
    )
    memory = {(row["shape"], row["peer"]): row for row in _of(rows, "memory")}
    lines = []
    timed = sorted(_of(rows, "time"), key=lambda row: (row["shape"] != "opt-125m", -(row["cpu_ratio"] or row["ratio"])))
    for row in timed:
        extra = memory.get((row["shape"], row["peer"]), {})
        lines.append(
            [
                f"{row['shape']}, {row['batch']} × {row['tokens']}",
                _named(row),
                milliseconds(row["baseline_seconds_median"]),
                milliseconds(row["seconds_median"]),
                f"{row['ratio']:.1f} ({row['ratio_p10']:.1f} to {row['ratio_p90']:.1f})",
                number(row, "cpu_ratio", ".1f"),
                number(extra, "extra_memory_mib", ".0f"),
                number(extra, "ours_extra_memory_mib", ".0f"),
            ]
        )
    return headings, lines


_PROMISES = ("same_seed_same_bits", "other_seed_other_bits", "seed_0_works", "noise_differs")


def exactness(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    headings = (
        "package",
        "weights after a step with lr = 0",
        "same seed, same bits",
        "other seed, other bits",
        "seed 0",
        "equal shapes, other noise",
    )
    return headings, [
        [
            row["peer"],
            "the same bits" if row["restored_bits"] else f"off by {row['restored_relative_rms']:.0e} of their size",
            *(_yes(row.get(promise)) for promise in _PROMISES),
        ]
        for row in _of(rows, "exact")
    ]


def _yes(value: bool | None) -> str:
    return "cannot be chosen" if value is None else "yes" if value else "**no**"


def loss(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    return ("package", "runs", "steps", "loss before", "after"), [
        [
            row["peer"],
            str(row["runs"]),
            str(row["steps"]),
            f"{row['loss_before']:.3f}",
            number(row, "loss_after", ".3f"),
        ]
        for row in _of(rows, "loss")
    ]
