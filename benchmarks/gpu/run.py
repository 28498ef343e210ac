"""`gpu`: the stages one after the other, and after each of them all that there is in one file."""

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
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bench import rows
from ..bench.terminal import Plain
from . import headlines, packed, plan, process
from .plan import Stage

# How a stage can end. A stage has "nothing" if all its cases were skipped, and comes "late" if no time was left for it.
OK, WRONG, FAILED, CUT, LATE, NOTHING = "ok", "wrong", "failed", "cut", "late", "nothing"
_SHORTEST = 0.5  # of the time that a stage is expected to take; with less it is not begun
_SAID_LAST = 5  # lines of a stage that has not ended well
_WIDTH, _FEW = 90, 8  # characters of a headline in the table, headlines of a stage


def run(options: Namespace) -> int:
    """Do what the options of `gpu` ask for.

    Returns:
        The exit status: 0 if all stages ran, 1 if a result was wrong, else 3 if a stage failed or was cut, else 2 if
        the options ask for nothing that can be done.
    """
    if options.read is not None:
        from . import read  # with all that draws and writes documents

        return read.run(options.read, options.into)
    cores = len(os.sched_getaffinity(0))
    stages = plan.stages(plan.toy() if options.dry_run else plan.of_gpu(cores))
    if options.only is not None:
        stages = [stage for stage in stages if stage.vital or re.search(options.only, stage.name)]
    if options.plan:
        _show_plan(stages, options.seconds)
        return 0
    if options.out is None:
        print("gpu: expected --out FOLDER, where gpu.tgz goes (or --plan, or --read FILE)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="zo-gpu-") as temporary:
        return Run(stages, Path(options.out), Path(temporary), options).all()


def _show_plan(stages: Sequence[Stage], seconds: float) -> None:
    lines = [
        [s.name, f"{s.expected:.0f}", f"{s.limit:.0f}", shlex.join(s.arguments(s.limit, "FOLDER"))] for s in stages
    ]
    expected, limits = (sum(getattr(s, name) for s in stages) for name in ("expected", "limit"))
    lines.append(["together", f"{expected:.0f}", f"{limits:.0f}", ""])
    end = f"{seconds:g} s for everything: what no longer fits is left out"
    Plain().table("stages", end, ["stage", "expected s", "limit s", "command"], lines)


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
        self._told: dict[str, Any] = {
            "format": packed.FORMAT,
            "dry_run": options.dry_run,
            "commit": rows.commit() or options.commit,
            "began_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "planned": [stage.name for stage in stages],
            "stages": [],
        }

    @property
    def _ended(self) -> list[dict[str, Any]]:
        return self._told["stages"]

    def all(self) -> int:
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / packed.NAME).unlink(missing_ok=True)  # an earlier run's would be taken for this one's
        try:
            with _terminated_is_interrupted():
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
        ended = process.Ended(None, seconds)  # if the run is interrupted meanwhile
        try:
            ended = process.run(command, seconds, self._printed(stage), self._environment())
        finally:
            self._note(stage, *self._judged(stage, ended), ended.seconds, seconds)

    def _environment(self) -> dict[str, str]:
        """Nothing is fetched; Triton's and Inductor's kernels are compiled anew, once for all stages."""
        path = os.pathsep.join(filter(None, (str(process.ROOT), os.environ.get("PYTHONPATH"))))
        env = {
            "PYTHONPATH": path,
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

    def _printed(self, stage: Stage) -> Path:
        return self._folder / f"{stage.name}.txt"

    def _judged(self, stage: Stage, ended: process.Ended) -> tuple[str, list[str]]:
        """How a stage ended, and its headlines, or the reason."""
        printed = self._printed(stage).read_text(errors="replace")
        found = self._rows(stage)
        if stage.is_tests:
            tested = headlines.tested(printed)
            wrong, lines, nothing = tested.failed, tested.lines, tested.none_ran
        else:
            wrong = [f"WRONG {row['case']}: {row['wrong']}" for row in found if row.get("correct") is False]
            lines = wrong + headlines.of(stage.name, found)
            if not lines and not stage.writes_rows:
                lines = printed.strip().splitlines()[-1:]
            nothing = bool(found) and all(row.get("skipped") is not None for row in found)
        if wrong:
            return WRONG, lines
        if ended.status is None:
            return CUT, [*lines, f"stopped after {ended.seconds:.0f} s"]
        if ended.status:
            return FAILED, [f"exit status {ended.status}", *printed.strip().splitlines()[-_SAID_LAST:]]
        if stage.writes_rows and not found:
            return FAILED, ["it has written no rows"]
        return (NOTHING if nothing else OK), lines

    def _rows(self, stage: Stage) -> list[dict[str, Any]]:
        try:
            return json.loads((self._folder / f"{stage.name}.json").read_text())
        except (OSError, ValueError):  # it has written none, or was killed while it did
            return []

    def _note(self, stage: Stage, status: str, lines: list[str], seconds: float, limit: float) -> None:
        told = {"name": stage.name, "status": status, "seconds": round(seconds, 1), "limit": round(limit, 1)}
        self._ended.append({**told, "lines": lines})
        print(f"   {status} after {seconds:.0f} s" + "".join(f"\n   {line}" for line in lines[:_FEW]), flush=True)
        (self._folder / packed.RUN).write_text(json.dumps(self._told, indent=1) + "\n")
        for large in packed.pack(self._folder, self._out / packed.NAME):
            print(f"   {large} is too large to be packed")

    def _show(self) -> None:
        cells = []
        for e in self._ended:
            headline = e["lines"][0] if e["lines"] else ""
            cells.append([e["name"], e["status"], f"{e['seconds']:.0f}", f"{e['limit']:.0f}", headline[:_WIDTH]])
        missing = [name for name in self._told["planned"] if name not in {e["name"] for e in self._ended}]
        cells += [[name, "not begun", "", "", ""] for name in missing]
        total = f"{sum(e['seconds'] for e in self._ended):.0f} s; everything is in {self._out / packed.NAME}"
        Plain().table("stages", total, ["stage", "status", "seconds", "limit", "headline"], cells)
        for e in self._ended:
            whole = len(e["lines"]) == 1 and len(e["lines"][0]) <= _WIDTH  # the table has it
            for line in [] if whole else e["lines"][:_FEW]:
                print(f"{e['name']}: {line}")

    def _status(self) -> int:
        statuses = {e["status"] for e in self._ended}
        if WRONG in statuses:
            return 1
        if len(self._ended) < len(self._stages) or statuses & {FAILED, CUT, LATE}:
            return 3
        # Without a GPU there is nothing for many stages to do; with one, that is what came to measure.
        return 3 if NOTHING in statuses and not self._options.dry_run else 0


@contextmanager
def _terminated_is_interrupted():
    """A machine that is taken away says so with SIGTERM: what is running is stopped, and the table still shown."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
