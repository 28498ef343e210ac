"""`profile`: the kernels and a step under the profilers at hand; a Chrome trace and a table of each are saved."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

from ..bench.profiled import profiled
from ..bench.registry import Case, Row
from ..kernels import cases as cases_kernels
from ..kernels.kernel_call import KernelCall, weights
from ..step import cases as cases_step
from ..step import launches
from ..step.methods import MEZO, Ours
from ..step.shapes import SHAPES

COLUMNS = (
    "case", "device", "dtype", "elements", "skipped", "correct", "wrong", "operation", "calls", "self_cpu_seconds",
    "cpu_seconds", "self_device_seconds", "device_seconds", "saved", "device_name", "torch_version",
    "zo_kernels_version", "commit", "date_utc",
)  # fmt: skip
_LISTED = 30  # operations, those that take longest
_REPEATS = 5
_NCU_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats")
_NCU_SECTIONS += ("Occupancy", "WarpStateStats")
_NCU_METRICS = "sm__inst_executed.sum,smsp__inst_executed_per_warp.ratio"
# Warps that wait for one reason, a warp that issues: what ncu calls them, with or without a label of its own.
_NCU_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio|Stall (.+)")
_STALLS = 4  # those that are told, the longest


def cases(options: Namespace) -> list[Case]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    unusable = cases_step.unusable(device, options.backend)
    facts = {"device": str(device), "dtype": str(cases_kernels.DTYPES[options.dtype]).removeprefix("torch.")}
    return [
        Case(
            "kernels",
            facts | {"elements": options.elements},
            lambda: _kernels(options, device),
            None if unusable == cases_step.NO_TRANSFORMERS else unusable,
        ),
        Case("step", facts, lambda: _step(options, device), unusable),
        Case(
            "ncu",
            facts | {"backend": _backend(options, device), "elements": options.elements},
            lambda: _ncu(options),
            _no_ncu(device),
        ),
    ]


def _backend(options: Namespace, device: torch.device) -> str:
    return options.backend or ("native" if device.type == "cpu" else "triton")


def _kernels(options: Namespace, device: torch.device) -> list[Row]:
    """Each kind of pass once, in a range of its name."""
    torch.set_num_threads(options.threads)
    w = weights(options.elements, cases_kernels.DTYPES[options.dtype], device)
    calls = {}
    for name, kind in cases_kernels.kinds(options.kinds).items():
        calls[name] = KernelCall(w, kind, _backend(options, device))
        if wrong := calls[name].check():
            return [{"correct": False, "wrong": f"{name}: {wrong}"}]
    with profiled(device) as seen:
        for call in calls.values():  # the first operations pay for the profiler's start
            call.run()
        for name, call in calls.items():
            for _ in range(_REPEATS):
                with record_function(name):
                    call.run()
    return _saved(seen, "kernels", Path(options.out))


def _step(options: Namespace, device: torch.device) -> list[Row]:
    """One step of MeZO, in place, with ranges for its forwards and its passes."""
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    batch = shape.batch if device.type == "cpu" else shape.gpu_batch
    task = shape.build(batch, device, cases_kernels.DTYPES[options.dtype])
    ranges = launches.Ranges()

    def loss() -> torch.Tensor:
        with ranges.part("forwards"):
            return task.loss(task.model)

    ours = Ours(MEZO, task.model, loss, ranges, options.backend)
    if wrong := ours.check():
        return [{"correct": False, "wrong": wrong}]
    ours.run()
    with profiled(device) as seen, record_function(launches.STEP):
        ours.run()
    return _saved(seen, "step", Path(options.out))


def _saved(seen: profile, name: str, folder: Path) -> list[Row]:
    """Write the trace and the table; a row for each operation that took long."""
    folder.mkdir(parents=True, exist_ok=True)
    trace, table = folder / f"{name}_trace.json", folder / f"{name}_table.txt"
    seen.export_chrome_trace(str(trace))
    averages = seen.key_averages()
    by = "self_device_time_total" if any(e.self_device_time_total for e in averages) else "self_cpu_time_total"
    table.write_text(averages.table(sort_by=by, row_limit=_LISTED) + "\n")
    longest = sorted(averages, key=lambda e: getattr(e, by), reverse=True)[:_LISTED]
    return [_row(e, f"{trace} {table}") for e in longest]


def _row(e: Any, saved: str) -> Row:
    return {
        "correct": True,
        "operation": e.key,
        "calls": e.count,
        "self_cpu_seconds": e.self_cpu_time_total / 1e6,
        "cpu_seconds": e.cpu_time_total / 1e6,
        "self_device_seconds": e.self_device_time_total / 1e6,
        "device_seconds": e.device_time_total / 1e6,
        "saved": saved,
    }


def _no_ncu(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "ncu needs a GPU"
    return None if shutil.which("ncu") else "ncu is not installed"


def _ncu(options: Namespace) -> list[Row]:
    """A pass of each kind under Nsight Compute, in a process of its own; its table is saved, a row a kernel."""
    kinds = list(cases_kernels.kinds(options.kinds))
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [part for name in _NCU_SECTIONS for part in ("--section", name)]
    target = [sys.executable, "-m", "benchmarks.profile.ncu_target", str(options.elements), options.dtype]
    target += [_backend(options, torch.device("cuda")), options.kinds]
    # Clocks as they are when passes are timed: by default ncu holds the GPU at its base clock.
    command = ["ncu", "--csv", "--print-details", "all", "--profile-from-start", "off", "--clock-control", "none"]
    command += [*sections, "--metrics", _NCU_METRICS, *target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if wrong := [line for line in done.stdout.splitlines() if line.startswith("WRONG")]:
        return [{"correct": False, "wrong": wrong[0]}]
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        said = [
            line for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if "ERR" in line or "==" in line
        ]
        return [{"skipped": f"ncu ended with {done.returncode}: {said[-1] if said else 'it said nothing'}"}]
    table = folder / f"ncu_{target[-2].replace(':', '_')}_table.csv"
    table.write_text("\n".join(lines) + "\n")
    rows = list(_ncu_rows(lines, table))
    # Where each pass was one kernel, which is so but for some that record, they are told apart by their order.
    return [{"kind": kind, **row} for kind, row in zip(kinds, rows, strict=True)] if len(rows) == len(kinds) else rows


def _ncu_rows(lines: list[str], table: Path) -> Iterator[Row]:
    """One for each kernel and metric that tells how long it took or what it was bound by."""
    wanted: dict[str, Callable[[float, str], Row]] = {
        "Duration": lambda value, unit: {"self_device_seconds": value * _SECONDS[unit]},
        "Memory Throughput": lambda value, unit: {"ncu_memory_percent": value} if unit == "%" else {},
        "Compute (SM) Throughput": lambda value, _: {"ncu_compute_percent": value},
        "Registers Per Thread": lambda value, _: {"ncu_registers": value},
        "Achieved Occupancy": lambda value, _: {"ncu_occupancy_percent": value},
        "Theoretical Occupancy": lambda value, _: {"ncu_theoretical_occupancy_percent": value},
        "Warp Cycles Per Issued Instruction": lambda value, _: {"ncu_cycles_per_issue": value},
    }
    rows: dict[str, Row] = {}
    stalls: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(lines):
        row = rows.setdefault(
            line["ID"], {"correct": True, "operation": line["Kernel Name"], "calls": 1, "saved": str(table)}
        )
        if (read := wanted.get(line["Metric Name"])) is not None:
            row |= read(_number(line["Metric Value"]), line["Metric Unit"])
        elif (found := _NCU_STALL.fullmatch(line["Metric Name"])) is not None:
            reason = found[1] or found[2].lower().replace(" ", "_")
            stalls.setdefault(line["ID"], {})[reason] = _number(line["Metric Value"])
    for of, row in rows.items():
        longest = sorted(stalls.get(of, {}).items(), key=lambda item: -item[1])[:_STALLS]
        yield row | {"ncu_stalls": ", ".join(f"{reason} {ratio:.2f}" for reason, ratio in longest) or None}


def _number(text: str) -> float:
    return float(text.replace(",", ""))


_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0}


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
