"""What came back from a GPU, as rows, figures and a page of its own."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..bench import plot, rows
from ..bench.document import ROOT, updated
from ..bench.registry import Row
from . import packed, page

INTO = ROOT / "docs" / "gpu"
_STATIC = ROOT / "docs" / "results" / "static.csv"  # under whose roofs what was measured is drawn
_MADE = ("*.csv", "*.png")


def run(file: str, into: str | None) -> int:
    """Make the page.

    Returns:
        The exit status: 2 if the file is not one that a run has packed, or the page does not belong where it would go.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            told = packed.unpack(Path(file), folder)
            found = {stage: _rows(folder / f"{stage}.json") for stage in told["planned"]}
            machine = next(row for row in found["machine"] if row.get("correct"))
        except packed.Foreign as error:
            print(f"gpu: {error}", file=sys.stderr)
            return 2
        except (KeyError, StopIteration):
            print(f"gpu: {file}: expected a run whose stage machine has told what it ran on, got none", file=sys.stderr)
            return 2
    if told["dry_run"] and into is None:
        print(f"gpu: {file} is of a dry run: expected --into FOLDER, docs/gpu is for what GPUs did", file=sys.stderr)
        return 2
    target = Path(into) if into else INTO
    target = (target / _name(machine["device_name"], told["dry_run"])).resolve()
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _MADE:  # those of an earlier run would be taken for this one's
        for old in target.glob(pattern):
            old.unlink()
    found["stages"] = _stages(told)
    written = [_written(of, target / f"{stage}.csv") for stage, of in found.items() if of]
    plot.run([str(file) for file in (*written, *([] if told["dry_run"] else [_STATIC]))], str(target))
    text = page.made(machine, told, found, target)
    (target / "README.md").write_text(updated(text))
    print(target / "README.md")
    return 0


def _name(device: str, dry: bool) -> str:
    """NVIDIA-H100-80GB-HBM3 for NVIDIA H100 80GB HBM3."""
    name = "-".join(re.findall(r"[\w.]+", device))
    return f"dry-run-{name}" if dry else name


def _rows(path: Path) -> list[Row]:
    """A stage's rows, none if it has written none; the files that they name, without the folders of that machine."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [
        row | {"saved": " ".join(Path(name).name for name in row["saved"].split())} if row.get("saved") else row
        for row in found
    ]


def _stages(told: dict[str, Any]) -> list[Row]:
    ended = {stage["name"]: stage for stage in told["stages"]}
    return [
        {
            "case": name,
            "status": ended[name]["status"] if name in ended else "not begun",
            "seconds": ended[name]["seconds"] if name in ended else None,
            "limit_seconds": ended[name]["limit"] if name in ended else None,
            "told": "; ".join(ended[name]["lines"]) if name in ended else None,
            "commit": told["commit"],
            "date_utc": told["began_utc"],
        }
        for name in told["planned"]
    ]


def _written(found: list[Row], path: Path) -> Path:
    return rows.write_csv(rows.complete(found, tuple(found[0])), path)
