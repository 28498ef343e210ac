"""Tables of a page about a GPU: rows -> headings and lines, only of rows that are correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bench.document import number
from ..bench.registry import Row
from .headlines import TUNING, best_variants, by_case, good

Table = tuple[Sequence[str], list[list[str]]]
_MACHINE = {
    "device": "device_name", "driver": "driver", "compute capability": "compute_capability",
    "multiprocessors": "multiprocessors", "memory, GiB": "memory_gib", "highest clock, MHz": "clock_mhz",
    "highest memory clock, MHz": "memory_clock_mhz", "power limit, W": "power_limit_w", "processor": "processor",
    "cores": "cores", "its instruction sets": "instruction_sets", "Python": "python_version",
    "PyTorch": "torch_version", "Triton": "triton_version", "transformers": "transformers_version",
    "CUDA of PyTorch": "cuda_version", "nvcc": "nvcc_version", "ncu": "ncu_version",
    "zo_kernels": "zo_kernels_version", "commit": "commit", "date": "date_utc",
}  # fmt: skip
_LISTED = 12  # operations of a trace


def _machine(rows: Sequence[Row]) -> Table:
    return ("", ""), [
        [name, str(row[column])]
        for row in good(rows)
        for name, column in _MACHINE.items()
        if row.get(column) is not None
    ]


def _stages(rows: Sequence[Row]) -> Table:
    lines = [
        [
            row["case"],
            row["status"],
            number(row, "seconds", ".0f"),
            number(row, "limit_seconds", ".0f"),
            row["told"] or "",
        ]
        for row in rows
    ]
    return ("stage", "", "seconds", "limit", "what it found, or why it did not"), lines


def _bits(rows: Sequence[Row]) -> Table:
    """How many comparisons of a backend were equal, all of them told apart from those that were not or did not run."""
    lines = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        equal, wrong = good(own), [row for row in own if row.get("correct") is False]
        reasons = [row["wrong"] for row in wrong] + [row["skipped"] for row in own if row.get("skipped") is not None]
        longest = max((row["elements"] for row in equal), default=0)
        lines.append([backend, str(len(equal)), str(len(wrong)), f"{longest:,}", "; ".join(dict.fromkeys(reasons))])
    return ("backend", "equal", "not equal", "elements of the longest", "why not"), lines


def _passes(rows: Sequence[Row]) -> Table:
    """A line a pass: its share of a copy in the same run, and how much faster it is than each other way."""
    found = good(rows)
    others = list(dict.fromkeys(row["baseline"] for row in found))
    lines = []
    for row in by_case(found):
        own = {other["baseline"]: other for other in found if other["case"] == row["case"]}
        lines.append(
            [
                row["case"],
                f"{row['elements']:,}",
                number(row, "gelem_per_s", ".1f"),
                number(row, "gb_per_s", ",.0f"),
                number(row, "share_of_copy", ".1%"),
                *(_ratio(own.get(name)) for name in others),
            ]
        )
    return ("pass", "elements", "10⁹ a second", "GB/s", "of a copy", *(f"against {name}" for name in others)), lines


def _ratio(row: Row | None) -> str:
    return "–" if row is None else f"{row['ratio']:.2f} ({row['ratio_p10']:.2f}–{row['ratio_p90']:.2f})"


def _tuning(rows: Sequence[Row]) -> Table:
    """A line for what was changed; the fastest of each pass in bold, if it is faster than the default."""
    found = [row for row in good(rows) if TUNING in row["case"]]
    best = {row["case"] for row in best_variants(found).values()}
    lines = []
    for row in by_case(found):
        stem, _, changed = row["case"].partition(TUNING)
        ratio = _ratio(row)
        lines.append(
            [stem, changed, f"**{ratio}**" if row["case"] in best else ratio, number(row, "share_of_copy", ".1%")]
        )
    return ("pass", "changed", "speed against the default", "of a copy"), lines


def _host(rows: Sequence[Row]) -> Table:
    lines = [
        [
            row["case"],
            row["launches"],
            str(row["passes_per_step"]),
            *(number(row, name, ",.0f") for name in ("forwards_us", "step_us", "ours_us_per_step")),
            number(row, "ours_us_per_module", ".1f"),
        ]
        for row in by_case(good(rows))
    ]
    headings = (
        "case",
        "launches",
        "passes",
        "two forwards, µs",
        "step, µs",
        "ours, µs",
        "ours, µs a module and forward",
    )
    return headings, lines


def _steps(rows: Sequence[Row]) -> Table:
    lines = []
    for row in good(rows):
        parts = (f"{part}_seconds_median" for part in ("forwards", "passes", "other"))
        lines.append(
            [
                row["case"],
                row["backend"],
                _milliseconds(row, "seconds_median"),
                *(_milliseconds(row, part) for part in parts),
                number(row, "step_per_forwards", ".3f"),
                row["baseline"],
                _ratio(row),
                number(row, "extra_memory_mib", ",.1f"),
                number(row, "pass_launches_per_step", "g"),
                number(row, "synchronisations_per_step", "g"),
            ]
        )
    headings = ("case", "backend", "ms a step", "forwards", "passes", "other", "step/forwards", "against", "speed")
    return (*headings, "extra MiB", "pass launches", "waits"), lines


def _milliseconds(row: Row, key: str) -> str:
    return "–" if row.get(key) is None else f"{1e3 * row[key]:,.2f}"


def _profile(rows: Sequence[Row]) -> Table:
    found = good(rows)
    on_device = any(row["self_device_seconds"] for row in found)
    by = "self_device_seconds" if on_device else "self_cpu_seconds"
    longest = sorted(found, key=lambda row: -(row[by] or 0.0))[:_LISTED]
    own = ("self_device_seconds", "self_cpu_seconds")
    lines = [
        [f"`{row['operation'][:80]}`", str(row["calls"]), *(_milliseconds(row, key) for key in own)] for row in longest
    ]
    return ("operation", "calls", "ms of the device", "ms of the host"), lines


def _ncu(rows: Sequence[Row]) -> Table:
    lines = []
    for row in good(rows):
        shares = ("memory", "compute", "occupancy", "theoretical_occupancy")
        lines.append(
            [
                row["backend"],
                row.get("kind") or f"`{row['operation'][:40]}`",
                _milliseconds(row, "self_device_seconds"),
                *(number(row, f"ncu_{name}_percent", ".1f") for name in shares),
                number(row, "ncu_registers", ".0f"),
                number(row, "ncu_cycles_per_issue", ".2f"),
                row.get("ncu_stalls") or "–",
            ]
        )
    headings = ("backend", "pass", "ms", "memory %", "compute %", "occupancy %", "it could have %", "registers")
    return (*headings, "cycles an issue", "warps that wait, for each that issues"), lines


def _offload(rows: Sequence[Row]) -> Table:
    lines = [
        [
            row["case"],
            _milliseconds(row, "seconds_median"),
            _milliseconds(row, "baseline_seconds_median"),
            number(row, "weights_gb", ".2f"),
            number(row, "weights_on_device_gb", ".2f"),
            number(row, "peak_gb", ".2f"),
            number(row, "copied_gb_per_step", ".2f"),
            f"{row['copied_gb_per_step'] / row['seconds_median']:.1f}",
        ]
        for row in good(rows)
    ]
    headings = ("shape", "ms a step", "with weights on the device", "weights, GB", "of them on the device")
    return (*headings, "peak, GB", "copied a step, GB", "GB/s copied"), lines


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "gpu-machine": _machine,
    "gpu-stages": _stages,
    "gpu-bits": _bits,
    "gpu-passes": _passes,
    "gpu-tuning": _tuning,
    "gpu-host": _host,
    "gpu-steps": _steps,
    "gpu-profile": _profile,
    "gpu-ncu": _ncu,
    "gpu-offload": _offload,
}
