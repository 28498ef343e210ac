"""`machine`: the GPU and its driver, the processor and the versions, as one row."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version

import torch

from zo_kernels.backends.native import instruction_sets

from ..bench.registry import Case, Row
from ..bench.rows import cpu_model

# nvidia-smi's names; the clocks and the power are the highest that are allowed.
_ASKED = {
    "driver": "driver_version",
    "clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
}
_SHOWN = ("driver", "compute_capability", "memory_gib", "processor", "cores", "python_version", "triton_version")
_PATIENCE_SECONDS = 8.0


def cases(options: Namespace) -> list[Case]:
    no_gpu = options.device == "cuda" and not torch.cuda.is_available()
    skipped = "PyTorch sees no GPU here" if no_gpu else None
    return [Case("machine", {"device": options.device}, lambda: [_facts(options.device)], skipped)]


def _facts(device: str) -> Row:
    return {
        "correct": True,
        **(_gpu() if device == "cuda" else {}),
        "processor": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": " ".join(instruction_sets()),
        "python_version": platform.python_version(),
        "triton_version": _version("triton"),
        "transformers_version": _version("transformers"),
        "cuda_version": torch.version.cuda,
        "nvcc_version": _said(r"release ([\d.]+)", "nvcc", "--version"),
        "ncu_version": _said(r"Version ([\d.]+)", "ncu", "--version"),
    }


def _gpu() -> Row:
    seen = torch.cuda.get_device_properties(0)
    query = f"--query-gpu={','.join(_ASKED.values())}"
    values = (_said(r"(.+)", "nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits") or "").split(", ")
    return {
        "compute_capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_gib": round(seen.total_memory / 2**30, 1),
        **(dict(zip(_ASKED, values, strict=True)) if len(values) == len(_ASKED) else {}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(pattern: str, *command: str) -> str | None:
    """The pattern's group in what a program prints; None if it is missing, fails or prints something else."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, done.stdout)
    return found[1] if found and not done.returncode else None


def cells(row: Row) -> dict[str, str]:
    return {name.replace("_", " "): str(row[name]) for name in _SHOWN if row.get(name) is not None}
