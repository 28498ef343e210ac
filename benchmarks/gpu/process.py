"""A command in a process of its own, with a time limit. Whatever happens to it costs nobody else anything."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TO_WRITE_SECONDS = 8.0  # an interrupted process has so long to write what it found


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (None if it was stopped at its limit), and how long it ran."""

    status: int | None
    seconds: float


def run(command: Sequence[str], seconds: float, output: Path, env: Mapping[str, str]) -> Ended:
    """Run a command, and write what it prints to a file.

    At its limit it is interrupted, as by Ctrl-C, and a little later killed. It leads a process group of its own, and
    when it has ended, however that was, the rest of the group is killed: a child that hangs would keep GPU memory.
    """
    start = time.monotonic()
    with output.open("wb") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        try:
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
                _signal(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TO_WRITE_SECONDS)
        finally:
            _signal(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(status, time.monotonic() - start)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
