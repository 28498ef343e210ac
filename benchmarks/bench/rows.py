"""Results as flat rows whose keys carry their units, and the files they are written to."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from .registry import Row

# Every row of every timed suite has these, null where there is nothing to say; a suite's own follow.
COLUMNS = (
    "case", "backend", "device", "dtype", "elements", "threads",
    "correct", "wrong", "skipped", "samples",
    "seconds_median", "seconds_p10", "seconds_p90", "cpu_seconds_median",
    "gb_per_s", "gelem_per_s", "share_of_copy", "copy_gb_per_s",
    "baseline", "baseline_seconds_median", "baseline_cpu_seconds_median",
    "ratio_of", "ratio", "ratio_p10", "ratio_p90", "cpu_ratio", "target", "target_met", "target_missed",
    "device_name", "torch_version", "zo_kernels_version", "commit", "date_utc",
)  # fmt: skip
COMMIT = "ZO_KERNELS_COMMIT"  # in the environment of a copy of the code that has no history


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    if device == "cpu":
        return cpu_model()
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


def commit() -> str | None:
    """The commit checked out, with "-dirty" if files differ from it; where git cannot tell, what the environment says,
    else None.
    """
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return os.environ.get(COMMIT)
    return done.stdout.strip() or os.environ.get(COMMIT)


class Stamp:
    """What is the same for all rows of a run."""

    def __init__(self) -> None:
        import torch

        import zo_kernels

        self._run = {
            "torch_version": torch.__version__,
            "zo_kernels_version": zo_kernels.__version__,
            "commit": commit(),
            "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._names: dict[str, str] = {}

    def __call__(self, row: Row) -> Row:
        device = row.get("device")
        if device is None:  # nothing ran on one
            return {**row, **self._run}
        if device not in self._names:
            self._names[device] = device_name(device)
        return {**row, "device_name": self._names[device], **self._run}


def complete(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Rows with the same keys in the same order."""
    own = dict.fromkeys(key for row in rows for key in row if key not in columns)
    return [{key: row.get(key) for key in (*columns, *own)} for row in rows]


def write(rows: Sequence[Row], path: Path, columns: Sequence[str] = COLUMNS) -> Path:
    """Write JSON (a list of flat objects) to `path`, and CSV beside it; returns the CSV's path."""
    rows = complete(rows, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return write_csv(rows, path.with_suffix(".csv"), columns)


def write_csv(rows: Sequence[Row], path: Path, columns: Sequence[str] = ()) -> Path:
    """Write rows that have the same keys; without any, the columns alone."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else list(columns))
        writer.writeheader()
        writer.writerows(rows)
    return path
