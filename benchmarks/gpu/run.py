"""`gpu`: runs the stages one after the other, and packs everything found so far after each of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bench import report, rows
from . import packed, plan, process
from .plan import Stage

# How a stage can end. "nothing": all its cases were skipped. "late": too little time was left to begin it.
OK, WRONG, FAILED, CUT, LATE, NOTHING = "ok", "wrong", "failed", "cut", "late", "nothing"
_SHORTEST = 0.5  # of the expected time; a stage is not begun with less
_SAID_LAST = 5  # lines of a stage that failed
_WIDTH, _FEW = 90, 8  # characters of a headline in the table, headlines of a stage


def run(options: Namespace) -> int:
    """Do what the options of `gpu` ask for.

    Returns:
        The exit status: 0 if all stages ran, 1 if a result was wrong, else 3 if a stage failed or was cut, else 2 if
        the options ask for something that cannot be done.
    """
    if options.read is not None:
        from . import page  # which imports all that draws figures and writes documents

        return page.run(options.read, options.into)
    stages = plan.stages(plan.toy() if options.dry_run else plan.of_gpu(len(os.sched_getaffinity(0))))
    if options.only is not None:
        stages = [stage for stage in stages if stage.vital or re.search(options.only, stage.name)]
    if options.plan:
        lines = [
            [s.name, f"{s.expected:.0f}", f"{s.limit:.0f}", shlex.join(s.arguments(s.limit, "FOLDER"))] for s in stages
        ]
        expected, limits = sum(s.expected for s in stages), sum(s.limit for s in stages)
        lines.append(["together", f"{expected:.0f}", f"{limits:.0f}", ""])
        end = f"{options.seconds:g} s for everything: a stage that no longer fits is left out"
        report.table("stages", ["stage", "expected s", "limit s", "command"], lines, end)
        return 0
    if options.out is None:
        print("gpu: expected --out FOLDER, where gpu.tgz goes (or --plan, or --read FILE)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="zo-gpu-") as temporary:
        return Run(stages, Path(options.out), Path(temporary), options).all()


class Run:
    """A run of stages.

    Args:
        stages: in their order.
        out: the folder of gpu.tgz.
        temporary: a folder for everything else.
        options: of `gpu`.
    """

    def __init__(self, stages: Sequence[Stage], out: Path, temporary: Path, options: Namespace):
        self._stages, self._out, self._options = stages, out, options
        self._folder, self._caches = temporary / "found", temporary / "caches"
        self._folder.mkdir()
        self._deadline = time.monotonic() + options.seconds
        self._ended: list[dict[str, Any]] = []
        self._told = {
            "format": packed.FORMAT,
            "dry_run": options.dry_run,
            "commit": rows.commit() or options.commit,
            "began_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "planned": [stage.name for stage in stages],
            "stages": self._ended,
        }

    def all(self) -> int:
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / packed.NAME).unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        try:
            with _sigterm_interrupts():
                for stage in self._stages:
                    self._stage(stage)
                    if stage.vital and self._ended[-1]["status"] != OK:
                        print(
                            f"Without {stage.name} nothing else is run by {sys.executable} (make gpu PYTHON=... takes "
                            "another); python -m benchmarks gpu --dry-run tries all stages without a GPU."
                        )
                        break
        except KeyboardInterrupt:
            print("interrupted")
        self._show()
        return self._status()

    def _stage(self, stage: Stage) -> None:
        left = self._deadline - time.monotonic() - process.TO_WRITE_SECONDS
        seconds = min(stage.limit, left)
        if seconds < _SHORTEST * stage.expected:
            reason = f"{max(0, left):.0f} s were left, and about {stage.expected:g} are needed"
            self._note(stage, LATE, [reason], 0.0, 0.0)
            return
        print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
        command = [sys.executable, *stage.arguments(seconds, str(self._folder))]
        printed = self._folder / f"{stage.name}.txt"
        ended = process.Ended(None, seconds)  # if the run is interrupted meanwhile
        try:
            ended = process.run(command, seconds, printed, self._environment())
        finally:
            text = printed.read_text(errors="replace").strip()
            if stage.suite is not None:  # the suite's table, without its progress
                print("\n".join(line for line in text.splitlines() if not re.match(r"\d+/\d+ ", line)))
            self._note(stage, *self._judged(stage, ended, text), ended.seconds, seconds)

    def _environment(self) -> dict[str, str]:
        """Nothing is downloaded; Triton's and Inductor's kernels are compiled anew, once for all stages."""
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(process.ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self._caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self._caches / "inductor"),
            "HF_HUB_OFFLINE": "1",
        }
        if self._told["commit"]:
            env[rows.COMMIT] = self._told["commit"]
        if self._options.dry_run:
            env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        return os.environ | env

    def _judged(self, stage: Stage, ended: process.Ended, printed: str) -> tuple[str, list[str]]:
        """How a stage ended; what it found, or why it did not."""
        found = self._rows(stage)
        said = printed.splitlines()
        if stage.suite is not None:
            wrong = [f"WRONG {row['case']}: {row['wrong']}" for row in found if row.get("correct") is False]
            skipped = Counter(row["skipped"] for row in found if row.get("skipped") is not None)
            reasons = [f"{n} of {len(found)} skipped: {reason}" for reason, n in skipped.items()]
            right = len(rows.good(found))
            lines = [*wrong, *([f"{right} of {len(found)} rows are correct"] if right else []), *reasons]
            nothing = skipped.total() == len(found)
        else:
            reasons = [line for line in said if re.match("FAILED |ERROR |SKIPPED ", line)] if stage.is_tests else []
            wrong = [line for line in reasons if line.startswith("FAILED ")]
            summary = [line for line in said if re.search(r"\w in [\d.]+s", line)] if stage.is_tests else said
            lines = [*(line.strip("= ") for line in summary[-1:]), *reasons]
            nothing = stage.is_tests and ended.status == 0 and " passed" not in "".join(summary[-1:])
        if wrong:
            return WRONG, lines
        if ended.status is None:
            return CUT, [*lines, f"stopped after {ended.seconds:.0f} s"]
        if ended.status:
            return FAILED, [f"exit status {ended.status}", *said[-_SAID_LAST:]]
        if stage.suite is not None and not found:
            return FAILED, ["it has written no rows"]
        return (NOTHING if nothing else OK), lines

    def _rows(self, stage: Stage) -> list[dict[str, Any]]:
        try:
            return json.loads((self._folder / f"{stage.name}.json").read_text())
        except (OSError, ValueError):  # it wrote none, or was killed while it wrote
            return []

    def _note(self, stage: Stage, status: str, lines: list[str], seconds: float, limit: float) -> None:
        told = {"name": stage.name, "status": status, "seconds": round(seconds, 1), "limit": round(limit, 1)}
        command = shlex.join(["python", *stage.arguments(stage.limit, "FOLDER")])
        self._ended.append({**told, "lines": lines, "suite": stage.suite, "command": command})
        print(f"   {status} after {seconds:.0f} s" + "".join(f"\n   {line}" for line in lines[:_FEW]), flush=True)
        (self._folder / packed.RUN).write_text(json.dumps(self._told, indent=1) + "\n")
        for large in packed.pack(self._folder, self._out / packed.NAME):
            print(f"   {large} is too large to be packed")

    def _show(self) -> None:
        cells = []
        for e in self._ended:
            headline = e["lines"][0][:_WIDTH] if e["lines"] else ""
            cells.append([e["name"], e["status"], f"{e['seconds']:.0f}", f"{e['limit']:.0f}", headline])
        cells += [[stage.name, "not begun", "", "", ""] for stage in self._stages[len(self._ended) :]]
        total = f"{sum(e['seconds'] for e in self._ended):.0f} s; everything is in {self._out / packed.NAME}"
        report.table("stages", ["stage", "status", "seconds", "limit", "headline"], cells, total)

    def _status(self) -> int:
        statuses = {e["status"] for e in self._ended}
        if WRONG in statuses:
            return 1
        if len(self._ended) < len(self._stages) or statuses & {FAILED, CUT, LATE}:
            return 3
        # Without a GPU many stages have nothing to do; where there is one, that is a failure.
        return 3 if NOTHING in statuses and not self._options.dry_run else 0


@contextmanager
def _sigterm_interrupts():
    """A machine that is taken away sends SIGTERM: stop what is running, and still show the table."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
