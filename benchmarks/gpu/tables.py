"""Tables of the page about a GPU: rows -> headings and lines, of correct rows only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..bench.registry import Row
from ..bench.rows import good
from ..evidence.cells import number

Table = tuple[Sequence[str], list[list[str]]]
# Heading -> column and format ("ms": seconds as milliseconds), or what makes the cell of a row.
Columns = Mapping[str, tuple[str, str] | Callable[[Row], str]]
_TUNING = "/tuning:"  # in a case's name, between the pass and what its launch changes
_LISTED = 12  # operations of a trace


def _table(columns: Columns, rows: Sequence[Row]) -> Table:
    return tuple(columns), [[_cell(row, column) for column in columns.values()] for row in rows]


def _cell(row: Row, column: tuple[str, str] | Callable[[Row], str]) -> str:
    if callable(column):
        return column(row)
    key, form = column
    if form == "ms" and row.get(key) is not None:
        return f"{1e3 * row[key]:,.2f}"
    return number(row, key, form)


def _ratio(row: Row | None) -> str:
    return "–" if row is None else f"{row['ratio']:.2f} ({row['ratio_p10']:.2f}–{row['ratio_p90']:.2f})"


def _first(rows: Sequence[Row]) -> list[Row]:
    """The first row of each case; the others differ in their baseline."""
    return list({row["case"]: row for row in reversed(rows)}.values())[::-1]


_MACHINE = {
    "device": "device_name", "driver": "driver", "compute capability": "compute_capability",
    "multiprocessors": "multiprocessors", "memory, GiB": "memory_gib", "highest clock, MHz": "clock_mhz",
    "highest memory clock, MHz": "memory_clock_mhz", "power limit, W": "power_limit_w", "processor": "processor",
    "cores": "cores", "its instruction sets": "instruction_sets", "Python": "python_version",
    "PyTorch": "torch_version", "Triton": "triton_version", "transformers": "transformers_version",
    "CUDA of PyTorch": "cuda_version", "nvcc": "nvcc_version", "ncu": "ncu_version",
    "zo_kernels": "zo_kernels_version", "commit": "commit", "date": "date_utc",
}  # fmt: skip


def _machine(rows: Sequence[Row]) -> Table:
    (row,) = good(rows)
    return ("", ""), [[name, str(row[key])] for name, key in _MACHINE.items() if row.get(key) is not None]


_STAGES: Columns = {
    "stage": ("case", ""), "": ("status", ""), "seconds": ("seconds", ".0f"), "limit": ("limit_seconds", ".0f"),
    "what it found, or why it did not": lambda row: row["told"] or "",
}  # fmt: skip


def _bits(rows: Sequence[Row]) -> Table:
    """For each backend how many comparisons were equal, how many were not, and why others did not run."""
    lines = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        equal, wrong = good(own), [row for row in own if row.get("correct") is False]
        reasons = [row["wrong"] for row in wrong] + [row["skipped"] for row in own if row.get("skipped") is not None]
        longest = max((row["elements"] for row in equal), default=0)
        lines.append([backend, str(len(equal)), str(len(wrong)), f"{longest:,}", "; ".join(dict.fromkeys(reasons))])
    return ("backend", "equal", "not equal", "elements of the longest", "why not"), lines


_PASSES: Columns = {
    "pass": ("case", ""), "elements": ("elements", ",d"), "10⁹ a second": ("gelem_per_s", ".1f"),
    "GB/s": ("gb_per_s", ",.0f"), "of a copy": ("share_of_copy", ".1%"),
}  # fmt: skip


def _passes(rows: Sequence[Row]) -> Table:
    """A line for each pass, with its speed against every baseline."""
    found = good(rows)
    by = {(row["case"], row["baseline"]): row for row in found}

    def against(name: str) -> Callable[[Row], str]:
        return lambda row: _ratio(by.get((row["case"], name)))

    others = dict.fromkeys(name for _, name in by)
    return _table({**_PASSES, **{f"against {name}": against(name) for name in others}}, _first(found))


def _tuning(rows: Sequence[Row]) -> Table:
    """A line for each change of a launch; the fastest of each pass in bold, if it beats the default."""
    found = [row for row in good(rows) if _TUNING in row["case"]]
    best: dict[str, Row] = {}
    for row in found:
        stem = row["case"].partition(_TUNING)[0]
        if row["ratio_p10"] > 1 and (stem not in best or row["ratio"] > best[stem]["ratio"]):
            best[stem] = row
    columns: Columns = {
        "pass": lambda row: row["case"].partition(_TUNING)[0],
        "changed": lambda row: row["case"].partition(_TUNING)[2],
        "speed against the default": lambda row: f"**{_ratio(row)}**" if row in best.values() else _ratio(row),
        "of a copy": ("share_of_copy", ".1%"),
    }
    return _table(columns, _first(found))


_HOST: Columns = {
    "case": ("case", ""), "launches": ("launches", ""), "passes": ("passes_per_step", ""),
    "two forwards, µs": ("forwards_us", ",.0f"), "step, µs": ("step_us", ",.0f"),
    "ours, µs": ("ours_us_per_step", ",.0f"),
    "ours, µs a module and forward": ("ours_us_per_module", ".1f"),
}  # fmt: skip
_STEPS: Columns = {
    "case": ("case", ""), "backend": ("backend", ""), "ms a step": ("seconds_median", "ms"),
    **{part: (f"{part}_seconds_median", "ms") for part in ("forwards", "passes", "other")},
    "step/forwards": ("step_per_forwards", ".3f"), "against": ("baseline", ""), "speed": _ratio,
    "extra MiB": ("extra_memory_mib", ",.1f"), "pass launches": ("pass_launches_per_step", "g"),
    "waits": ("synchronisations_per_step", "g"),
}  # fmt: skip
_PROFILE: Columns = {
    "operation": lambda row: f"`{row['operation'][:80]}`", "calls": ("calls", ""),
    "ms of the device": ("self_device_seconds", "ms"), "ms of the host": ("self_cpu_seconds", "ms"),
}  # fmt: skip


def _profile(rows: Sequence[Row]) -> Table:
    found = good(rows)
    by = "self_device_seconds" if any(row["self_device_seconds"] for row in found) else "self_cpu_seconds"
    return _table(_PROFILE, sorted(found, key=lambda row: -(row[by] or 0.0))[:_LISTED])


_NCU: Columns = {
    "backend": ("backend", ""), "pass": lambda row: row.get("kind") or f"`{row['operation'][:40]}`",
    "ms": ("self_device_seconds", "ms"), "memory %": ("ncu_memory_percent", ".1f"),
    "compute %": ("ncu_compute_percent", ".1f"), "occupancy %": ("ncu_occupancy_percent", ".1f"),
    "it could have %": ("ncu_theoretical_occupancy_percent", ".1f"), "registers": ("ncu_registers", ".0f"),
    "cycles an issue": ("ncu_cycles_per_issue", ".2f"), "warps that wait, for each that issues": ("ncu_stalls", ""),
}  # fmt: skip
_OFFLOAD: Columns = {
    "shape": ("case", ""), "ms a step": ("seconds_median", "ms"),
    "with weights on the device": ("baseline_seconds_median", "ms"), "weights, GB": ("weights_gb", ".2f"),
    "of them on the device": ("weights_on_device_gb", ".2f"), "peak, GB": ("peak_gb", ".2f"),
    "copied a step, GB": ("copied_gb_per_step", ".2f"),
    "GB/s copied": lambda row: f"{row['copied_gb_per_step'] / row['seconds_median']:.1f}",
}  # fmt: skip

TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "gpu-machine": _machine,
    "gpu-stages": partial(_table, _STAGES),
    "gpu-bits": _bits,
    "gpu-passes": _passes,
    "gpu-tuning": _tuning,
    "gpu-host": lambda rows: _table(_HOST, _first(good(rows))),
    "gpu-steps": lambda rows: _table(_STEPS, good(rows)),
    "gpu-profile": _profile,
    "gpu-ncu": lambda rows: _table(_NCU, good(rows)),
    "gpu-offload": lambda rows: _table(_OFFLOAD, good(rows)),
}
