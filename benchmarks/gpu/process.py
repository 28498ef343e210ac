"""A command in a process of its own, with a time limit, that costs nobody else anything."""

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
TO_WRITE_SECONDS = 8.0  # for a process that was told to stop to write what it has


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, None if it was stopped at its limit, and what it took."""

    status: int | None
    seconds: float


def run(command: Sequence[str], seconds: float, output: Path, env: Mapping[str, str]) -> Ended:
    """Run a command, with what it prints going to a file.

    Past its limit it is interrupted, as by Ctrl-C, and at last killed. It has a session of its own, and whatever is
    left of its process group is killed when it has ended, however that was: a child that hangs would keep the GPU's
    memory.
    """
    start = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
                _signal(process, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TO_WRITE_SECONDS)
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
    return Ended(status, time.monotonic() - start)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
