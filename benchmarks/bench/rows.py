"""Rows: flat dicts whose keys carry their units, stamped with what ran, and the files that hold them."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .registry import Row

# The columns that come first, as far as a run has them; a suite's own follow. A row without a value has null there.
COLUMNS = (
    "case", "backend", "device", "dtype", "elements", "threads",
    "correct", "wrong", "skipped", "samples",
    "seconds_median", "seconds_p10", "seconds_p90", "cpu_seconds_median",
    "gb_per_s", "gelem_per_s", "share_of_copy", "copy_gb_per_s",
    "baseline", "baseline_seconds_median", "baseline_cpu_seconds_median",
    "ratio_of", "ratio", "ratio_p10", "ratio_p90", "cpu_ratio", "target", "target_met", "target_missed",
    "device_name", "torch_version", "zo_kernels_version", "commit", "date_utc",
)  # fmt: skip
COMMIT = "ZO_KERNELS_COMMIT"  # the environment variable that names the commit of a copy without a history
_WORDS: dict[str, Any] = {"": None, "True": True, "False": False}


def good(rows: Sequence[Row]) -> list[Row]:
    """The rows whose figures may be published: their check passed."""
    return [row for row in rows if row.get("correct") is True and row.get("skipped") is None]


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    if device == "cpu":
        return cpu_model()
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


def commit() -> str | None:
    """The commit checked out, with "-dirty" if files differ from it; else what the environment says; else None."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return os.environ.get(COMMIT)
    return done.stdout.strip() or os.environ.get(COMMIT)


def stamped(rows: Sequence[Row]) -> list[Row]:
    """The rows with their device's name, the versions, the commit and the date."""
    import torch

    import zo_kernels

    run = {
        "torch_version": torch.__version__,
        "zo_kernels_version": zo_kernels.__version__,
        "commit": commit(),
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    names = {device: _device_name(device) for row in rows if (device := row.get("device")) is not None}
    return [row | ({"device_name": names[row["device"]]} if row.get("device") in names else {}) | run for row in rows]


def write(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as JSON (a list of flat objects) to `path`, and as CSV beside it; returns the CSV's path."""
    rows = complete(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    return write_csv(rows, path.with_suffix(".csv"))


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as CSV; returns the path."""
    rows = complete(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows with the same keys in the same order; each says whether it is correct, or why it was skipped."""
    found = dict.fromkeys(("correct", "wrong", "skipped", *(key for row in rows for key in row)))
    keys = [*(key for key in COLUMNS if key in found), *(key for key in found if key not in COLUMNS)]
    return [{key: row.get(key) for key in keys} for row in rows]


def read(path: Path) -> list[Row]:
    """The rows of a JSON file or of the CSV beside it; an empty cell of a CSV is None.

    Raises:
        OSError, ValueError: there is no such file, or it holds no rows.
    """
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
        else:
            rows = json.load(file)
    if not all(isinstance(row, dict) and "case" in row for row in rows):
        raise ValueError("rows without a case")
    return rows


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
