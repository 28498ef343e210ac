"""Tables of other packages' steps."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.registry import Row
from .cells import milliseconds, number

_FIRST_SHAPE = "opt-125m"  # where passes dominate
_PROMISES = ("same_seed_same_bits", "other_seed_other_bits", "seed_0_works", "noise_differs")


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    """Ours first."""
    found = [row for row in rows if row.get("experiment") == experiment and row.get("correct")]
    return sorted(found, key=lambda row: not row["peer"].startswith("ours"))


def _titles(rows: Sequence[Row]) -> dict[str, str]:
    return {"ours": "zo_kernels, in place"} | {row["peer"]: row["baseline"] for row in _of(rows, "time")}


def steps(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    headings = (
        "model, batch",
        "package",
        "processor ms",
        "ours",
        "ratio",
        "ratio by the clock (p10 to p90)",
        "extra MiB",
        "ours",
    )

    def where(row: Row) -> tuple[object, ...]:
        return tuple(row[key] for key in ("shape", "peer", "batch", "tokens"))

    memory = {where(row): row for row in _of(rows, "memory")}
    timed = sorted(_of(rows, "time"), key=lambda row: (row["shape"] != _FIRST_SHAPE, -row["cpu_ratio"]))
    return headings, [
        [
            f"{row['shape']}, {row['batch']} × {row['tokens']}",
            f"{row['baseline']} {row['peer_version'] or ''}".strip(),
            milliseconds(row["baseline_cpu_seconds_median"]),
            milliseconds(row["cpu_seconds_median"]),
            f"{row['cpu_ratio']:.1f}",
            f"{row['ratio']:.1f} ({row['ratio_p10']:.1f} to {row['ratio_p90']:.1f})",
            *(number(memory.get(where(row), {}), key, ".0f") for key in ("extra_memory_mib", "ours_extra_memory_mib")),
        ]
        for row in timed
    ]


def exactness(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    headings = (
        "package",
        "weights after a step with lr = 0",
        "a seed repeats",
        "seeds differ",
        "seed 0 repeats",
        "tensors of equal shape get different noise",
    )
    titles = _titles(rows)
    return headings, [
        [
            titles.get(row["peer"], row["peer"]),
            "the same bits" if row["restored_bits"] else f"off by {row['restored_relative_rms']:.0e} of their size",
            *(_yes(row.get(promise)) for promise in _PROMISES),
        ]
        for row in _of(rows, "exact")
    ]


def _yes(value: bool | None) -> str:
    return "no seed to choose" if value is None else "yes" if value else "**no**"


def loss(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    titles = _titles(rows)
    return ("package", "runs", "steps", "loss before", "after"), [
        [
            titles.get(row["peer"], row["peer"]),
            str(row["runs"]),
            str(row["steps"]),
            f"{row['loss_before']:.3f}",
            number(row, "loss_after", ".3f"),
        ]
        for row in _of(rows, "loss")
    ]
