"""`profile`: a step under PyTorch's profiler and the passes under Nsight Compute; traces and tables are saved."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from ..bench.profiled import profiled
from ..bench.registry import Case, Row, Unavailable, Wrong
from ..kernels import cases as cases_kernels
from ..kernels.cases import DTYPES
from ..step import cases as cases_step
from ..step import launches
from ..step.methods import MEZO, Ours
from ..step.shapes import SHAPES, device_of

_LISTED = 30  # operations that take longest
_ROOT = Path(__file__).parents[2]
_NCU_SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats",
)  # fmt: skip
_NCU_EXTRA = "sm__inst_executed.sum,smsp__inst_executed_per_warp.ratio"
_NCU_METRICS = {
    "Duration": "self_device_seconds",
    "Memory Throughput": "ncu_memory_percent",  # in %; ncu has it in bytes a second, too
    "Compute (SM) Throughput": "ncu_compute_percent",
    "Registers Per Thread": "ncu_registers",
    "Achieved Occupancy": "ncu_occupancy_percent",
    "Theoretical Occupancy": "ncu_theoretical_occupancy_percent",
    "Warp Cycles Per Issued Instruction": "ncu_cycles_per_issue",
}
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0}
# How many warps wait for one reason, for each that issues: ncu's name or its label for it.
_NCU_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio|Stall (.+)")
_STALLS = 4  # the longest are listed


def cases(options: Namespace) -> list[Case]:
    device = device_of(options)
    backend = options.backend or ("native" if device.type == "cpu" else "triton")
    facts = {"device": str(device), "dtype": str(DTYPES[options.dtype]).removeprefix("torch.")}
    sized = {"backend": backend, "elements": options.elements}
    return [
        Case("step", facts, lambda: _step(options, device), cases_step.unusable(device, options.backend)),
        Case("ncu", facts | sized, lambda: _ncu(options), _no_ncu(device)),
    ]


def _step(options: Namespace, device: torch.device) -> list[Row]:
    """One step of MeZO, in place, with ranges for its forwards and its passes."""
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    batch = shape.batch if device.type == "cpu" else shape.gpu_batch
    task = shape.build(batch, device, DTYPES[options.dtype])
    ranges = launches.Ranges()

    def loss() -> torch.Tensor:
        with ranges.part("forwards"):
            return task.loss(task.model)

    ours = Ours(MEZO, task.model, loss, ranges, options.backend)
    if wrong := ours.check():
        raise Wrong(wrong)
    ours.run()
    with profiled(device) as seen, record_function(launches.STEP):
        ours.run()
    return _saved(seen, Path(options.out))


def _saved(seen: profile, folder: Path) -> list[Row]:
    """Write the trace and the table; a row for each operation that took long."""
    folder.mkdir(parents=True, exist_ok=True)
    trace, table = folder / "step_trace.json", folder / "step_table.txt"
    seen.export_chrome_trace(str(trace))
    averages = seen.key_averages()
    by = "self_device_time_total" if any(e.self_device_time_total for e in averages) else "self_cpu_time_total"
    table.write_text(averages.table(sort_by=by, row_limit=_LISTED) + "\n")
    longest = sorted(averages, key=lambda e: getattr(e, by), reverse=True)[:_LISTED]
    times = ("self_cpu", "cpu", "self_device", "device")
    return [
        {"correct": True, "operation": e.key, "calls": e.count, "saved": f"{trace} {table}"}
        | {f"{which}_seconds": getattr(e, f"{which}_time_total") / 1e6 for which in times}
        for e in longest
    ]


def _no_ncu(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "ncu needs a GPU"
    return None if shutil.which("ncu") else "ncu is not installed"


def _ncu(options: Namespace) -> list[Row]:
    """A pass of each kind under Nsight Compute, in a process of its own; its table is saved, a row a kernel."""
    kinds, backend = list(cases_kernels.kinds(options.kinds)), options.backend or "triton"
    target = [sys.executable, "-m", "benchmarks.profile.ncu_target", str(options.elements), options.dtype, backend]
    # Leave the clocks as they are when passes are timed: by default ncu holds the GPU at its base clock.
    command = ["ncu", "--csv", "--print-details", "all", "--profile-from-start", "off", "--clock-control", "none"]
    command += [part for name in _NCU_SECTIONS for part in ("--section", name)]
    command += ["--metrics", _NCU_EXTRA, *target, options.kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    printed = done.stdout.splitlines()
    if wrong := [line for line in printed if line.startswith("WRONG")]:
        raise Wrong(wrong[0])
    lines = [line for line in printed if line.startswith('"')]
    if done.returncode or not lines:
        said = [line for line in (*printed, *done.stderr.splitlines()) if "ERR" in line or "==" in line]
        raise Unavailable(f"ncu ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
    table = Path(options.out, f"ncu_{backend.replace(':', '_')}_table.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n")
    rows = list(_ncu_rows(lines, table))
    # If each pass was one kernel (some that record are two), the order tells which is which.
    return [{"kind": kind, **row} for kind, row in zip(kinds, rows, strict=True)] if len(rows) == len(kinds) else rows


def _ncu_rows(lines: list[str], table: Path) -> Iterator[Row]:
    """A row for each kernel: how long it took, and what bound it."""
    rows: dict[str, Row] = {}
    stalls: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(lines):
        known = {"correct": True, "operation": line["Kernel Name"], "calls": 1, "saved": str(table)}
        row, of_kernel = rows.setdefault(line["ID"], known), stalls.setdefault(line["ID"], {})
        name, unit, text = (line[f"Metric {what}"] for what in ("Name", "Unit", "Value"))
        if name in _NCU_METRICS and (name != "Memory Throughput" or unit == "%"):
            factor = _SECONDS[unit] if name == "Duration" else 1.0
            row[_NCU_METRICS[name]] = factor * float(text.replace(",", ""))
        elif (stall := _NCU_STALL.fullmatch(name)) is not None:
            of_kernel[stall[1] or stall[2].lower().replace(" ", "_")] = float(text.replace(",", ""))
    for row, of_kernel in zip(rows.values(), stalls.values(), strict=True):
        longest = sorted(of_kernel.items(), key=lambda item: -item[1])[:_STALLS]
        yield row | {"ncu_stalls": ", ".join(f"{reason} {ratio:.2f}" for reason, ratio in longest) or None}


def cells(row: Row) -> dict[str, str]:
    by_ncu = {name: row.get(f"ncu_{name}_percent") for name in ("memory", "compute", "occupancy")}
    return {
        "operation": row.get("kind") or row["operation"][:80],
        "calls": str(row["calls"]),
        "self CPU ms": _ms(row.get("self_cpu_seconds")),
        "CPU ms": _ms(row.get("cpu_seconds")),
        "self device ms": _ms(row.get("self_device_seconds")),
        **{f"{name} %": f"{percent:.1f}" for name, percent in by_ncu.items() if percent is not None},
        **({"stalls": row["ncu_stalls"]} if row.get("ncu_stalls") else {}),
    }


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.3f}"
