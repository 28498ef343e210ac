"""When `zo-finetune` is stopped, its last line says what is safe and how to continue."""

from __future__ import annotations

import errno
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

from zo_kernels.trajectory.trajectory import read

_OF_THE_DISK = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CODE_IN_TEXT = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")  # in the messages of libraries written in Rust
_TRAJECTORY = "trajectory.zo"


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


class _Stage:
    """How far a command has got."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # being written: the run's, or the sweep's
        self.run: Path | None = None
        self.in_steps = False


_stage: ContextVar[_Stage | None] = ContextVar("stage", default=None)


def began(folder: Path) -> None:
    """Note that from now on files are written into a folder."""
    if (stage := _stage.get()) is not None:
        stage.folder = stage.folder or folder
        stage.run = folder


def steps_begin() -> None:
    """Note that all input has been checked: later errors are not blamed on what the user gave."""
    if (stage := _stage.get()) is not None:
        stage.in_steps = True


def told(do: Callable[[], int], command: str, wrong: Callable[[str], Any]) -> int:
    """Run a command and return its exit code. If a signal or an error ends it, print what is safe.

    Args:
        do: the whole command.
        command: the command line that continues a folder, without the name of the folder.
        wrong: called with the message of a ValueError, TypeError or OSError before the first step: the user's input
            cannot be used.
    """
    stage = _Stage()
    token = _stage.set(stage)
    try:
        with _terminated():
            return do()
    except KeyboardInterrupt:
        _say("interrupted", stage, command)
        return 128 + signal.SIGINT
    except Terminated:
        _say("terminated", stage, command)
        return 128 + signal.SIGTERM
    except Exception as error:
        if (reason := of_the_disk(error)) is not None:
            _say(reason, stage, command)
            return 1
        if not stage.in_steps and isinstance(error, ValueError | TypeError | OSError):
            wrong(str(error))
        _say(f"stopped by {type(error).__name__} (traceback below)", stage, command)
        raise
    finally:
        _stage.reset(token)


@contextmanager
def _terminated() -> Iterator[None]:
    """Let the first SIGTERM raise `Terminated`. Does nothing outside the main thread, where Python sets no handlers."""

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def of_the_disk(error: BaseException | None) -> str | None:
    """The reason, if an error was caused by the disk (full, read-only, damaged); else None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (match := _CODE_IN_TEXT.search(str(error))):
            code = int(match[1] or match[2])
        if code in _OF_THE_DISK:
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _say(why: str, stage: _Stage, command: str) -> None:
    print(f"zo-finetune: {' '.join(why.split())}; {_safe(stage, command)}", file=sys.stderr, flush=True)


def _safe(stage: _Stage, command: str) -> str:
    if stage.folder is None or stage.run is None:
        return "nothing was written"
    on = f"{command} {shlex.quote(str(stage.folder))}"
    if not any((stage.folder / name).is_file() for name in ("config.json", "sweep.json")):
        return f"no run was written to {stage.folder}; start it again"
    if (stage.folder / "model" / "labels.json").is_file():
        return f"the run has finished: its model is in {stage.folder / 'model'}"
    try:
        path = stage.run / _TRAJECTORY
        trajectory, _, fault = read(path.read_bytes())
    except OSError:
        return f"safe: the settings, in {stage.folder}; continue with: {on}"
    kept = f"step {trajectory.steps}, in {path}"
    if fault is not None and fault.kind != "incomplete":
        return f"safe: everything up to {kept}, which is damaged after it; continue with: {on} --recover"
    before = "" if stage.run == stage.folder else ", and the runs before it"
    return f"safe: everything up to {kept}{before}; continue with: {on}"
