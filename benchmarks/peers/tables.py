"""Tables of other packages' steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import Table, milliseconds, number
from ..bench.registry import Row

_FIRST_SHAPE = "opt-125m"  # where passes dominate
_PROMISES = {
    "same_seed_same_bits": "a seed repeats",
    "other_seed_other_bits": "seeds differ",
    "seed_0_works": "seed 0 repeats",
    "noise_differs": "tensors of equal shape get different noise",
}


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    """The right ones, ours first."""
    found = [row for row in rows if row.get("experiment") == experiment and row.get("correct")]
    return sorted(found, key=lambda row: not row["peer"].startswith("ours"))


def _titled(rows: Sequence[Row], experiment: str) -> list[tuple[str, Row]]:
    """Rows of an experiment with the title of their peer."""
    titles = {"ours": "zo_kernels, in place"} | {row["peer"]: row["baseline"] for row in _of(rows, "time")}
    return [(titles.get(row["peer"], row["peer"]), row) for row in _of(rows, experiment)]


def steps(rows: Sequence[Row]) -> Table:
    def where(row: Row) -> tuple[object, ...]:
        return tuple(row[key] for key in ("shape", "peer", "batch", "tokens"))

    memory = {where(row): row for row in _of(rows, "memory")}
    timed = sorted(_of(rows, "time"), key=lambda row: (row["shape"] != _FIRST_SHAPE, -row["cpu_ratio"]))
    times = ("processor ms", "ours", "ratio", "ratio by the clock (p10 to p90)")
    return ("model, batch", "package", *times, "extra MiB", "ours"), [
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


def exactness(rows: Sequence[Row]) -> Table:
    answers = {None: "no seed to choose", True: "yes", False: "**no**"}
    return ("package", "weights after a step with lr = 0", *_PROMISES.values()), [
        [
            title,
            "the same bits" if row["restored_bits"] else f"off by {row['restored_relative_rms']:.0e} of their size",
            *(answers[row[promise]] for promise in _PROMISES),
        ]
        for title, row in _titled(rows, "exact")
    ]


def loss(rows: Sequence[Row]) -> Table:
    return ("package", "runs", "steps", "loss before", "after"), [
        [
            title,
            str(row["runs"]),
            str(row["steps"]),
            f"{row['loss_before']:.3f}",
            number(row, "loss_after", ".3f"),
        ]
        for title, row in _titled(rows, "loss")
    ]


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {"peers": steps, "peers-exactness": exactness, "peers-loss": loss}
