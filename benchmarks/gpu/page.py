"""`gpu --read`: what came back from a GPU, as rows, figures and a page whose tables are made of those rows."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bench import plot, rows
from ..bench.document import ROOT, updated
from ..bench.registry import Row
from . import packed

INTO = ROOT / "docs" / "gpu"
_STATIC = ROOT / "docs" / "results" / "static.csv"  # its roofs are drawn over what was measured
_DRY = "**A dry run on a processor, at toy sizes: no figure here says anything about a GPU.**\n\n"
_FIGURES = {"bandwidth": "passes beside a copy", "roofline": "passes under the roofs", "step": "parts of a step"}


def run(file: str, into: str | None) -> int:
    """Make the page.

    Returns:
        The exit status: 2 if the file was not packed by a run, or the page would not belong where it would go.
    """
    try:
        with tempfile.TemporaryDirectory() as temporary:
            told = packed.unpack(Path(file), Path(temporary))
            found = {stage: _rows(Path(temporary, f"{stage}.json")) for stage in told["planned"]}
        machine = next(iter(rows.good(found.get("machine", []))), None)
        if machine is None:
            raise ValueError(f"{file}: expected a run whose stage machine told what it ran on, got none")
        if told["dry_run"] and into is None:
            raise ValueError(f"{file} is a dry run's: expected --into FOLDER, docs/gpu is for runs on GPUs")
    except ValueError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    name = "-".join(re.findall(r"[\w.]+", machine["device_name"]))  # NVIDIA-H100-80GB-HBM3
    folder = (Path(into) if into else INTO).resolve() / (f"dry-run-{name}" if told["dry_run"] else name)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.csv"), *folder.glob("*.png")):  # an earlier run's would be taken for this one's
        old.unlink()
    found["stages"] = _stages(told)
    files = [rows.write_csv(own, folder / f"{stage}.csv") for stage, own in found.items() if own]
    plot.run([str(file) for file in (*files, *([] if told["dry_run"] else [_STATIC]))], str(folder))
    (folder / "README.md").write_text(updated(_page(machine, told, found, folder)))
    print(folder / "README.md")
    return 0


def _rows(path: Path) -> list[Row]:
    """A stage's rows, none if it wrote none. The files that they name lose the folders of the other machine."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [
        row | {"saved": " ".join(Path(name).name for name in row["saved"].split())} if row.get("saved") else row
        for row in found
    ]


def _stages(told: Mapping[str, Any]) -> list[Row]:
    ended = {stage["name"]: stage for stage in told["stages"]}
    missing = {"status": "not begun", "seconds": None, "limit": None, "lines": []}
    return [
        {
            "case": name,
            "status": (stage := ended.get(name, missing))["status"],
            "seconds": stage["seconds"],
            "limit_seconds": stage["limit"],
            "told": "; ".join(stage["lines"]) or None,
            "commit": told["commit"],
            "date_utc": told["began_utc"],
        }
        for name in told["planned"]
    ]


def _page(machine: Row, told: Mapping[str, Any], found: Mapping[str, Sequence[Row]], folder: Path) -> str:
    """The page, its tables still empty. A stage without a correct row has no section."""
    fine = ("ok", "nothing") if told["dry_run"] else ("ok",)
    bad = [row["case"] for row in found["stages"] if row["status"] not in fine]
    idle = "; those with *nothing* need a GPU" if any(row["status"] == "nothing" for row in found["stages"]) else ""

    def table(name: str, stage: str) -> str:
        path = folder / f"{stage}.csv"
        if path.is_relative_to(ROOT):  # a page in the repository names its rows relative to it
            path = path.relative_to(ROOT)
        return f"<!-- table gpu-{name} of {path} -->\n<!-- end -->\n"

    parts = [
        f"# {machine['device_name']}\n\n{_DRY if told['dry_run'] else ''}"
        f"`make gpu` on {told['began_utc'][:10]}, commit {told['commit'] or 'unknown'}; "
        "`python -m benchmarks gpu --read gpu.tgz` made this page from the rows beside it.\n",
        table("machine", "machine"),
        "## Stages\n",
        f"Failed or missing: {', '.join(bad)}.\n" if bad else f"Every stage ran to its end{idle}.\n",
        table("stages", "stages"),
    ]
    for stage in told["stages"]:
        name, suite = stage["name"], stage["suite"]
        if suite not in (None, "machine") and rows.good(found[name]):
            parts += [f"## {name}\n", f"    {stage['command']}\n", table(suite, name)]
    figures = [f"![{text}]({name}.png)\n" for name, text in _FIGURES.items() if (folder / f"{name}.png").exists()]
    return "\n".join([*parts, *(["## Figures\n"] if figures else []), *figures])
