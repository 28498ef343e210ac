"""How `zo-finetune` ends when it is stopped: with a line that says what is safe, and how to go on."""

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
_CODE_IN_TEXT = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")  # of what is written in Rust
_TRAJECTORY = "trajectory.zo"


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


class _Stage:
    """How far a command has come."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # that is written: of the run, or the sweep
        self.run: Path | None = None
        self.in_steps = False


_stage: ContextVar[_Stage | None] = ContextVar("stage", default=None)


def began(folder: Path) -> None:
    """Note that files are written into a folder from now on."""
    if (stage := _stage.get()) is not None:
        stage.folder = stage.folder or folder
        stage.run = folder


def steps_begin() -> None:
    """Note that from now on nothing is said of what a user gave, since it has been checked."""
    if (stage := _stage.get()) is not None:
        stage.in_steps = True


def told(do: Callable[[], int], command: str, wrong: Callable[[str], Any]) -> int:
    """Do it, and return its exit code, or that of the signal or the error that ended it.

    Args:
        do: all of a command.
        command: that goes on with a folder, but for the folder's name.
        wrong: is told what is wrong with what a user gave: ValueError, TypeError or OSError before the first step.
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
        _say(f"{type(error).__name__}, whose traceback follows", stage, command)
        raise
    finally:
        _stage.reset(token)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once. In the main thread, where alone handlers can be set."""

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
    """What the disk could not do, if that is the reason of an error."""
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
        return f"nothing of a run was written to {stage.folder}; start it again"
    if (stage.folder / "model" / "labels.json").is_file():
        return f"the run has finished: its model is in {stage.folder / 'model'}"
    try:
        path = stage.run / _TRAJECTORY
        trajectory, _, fault = read(path.read_bytes())
    except OSError:
        return f"safe: the settings, in {stage.folder}; go on with: {on}"
    kept = f"step {trajectory.steps}, in {path}"
    if fault is not None and fault.kind != "incomplete":
        return f"safe: all up to {kept}, which is damaged; go on with: {on} --recover"
    before = "" if stage.run == stage.folder else ", and the runs before it"
    return f"safe: all up to {kept}{before}; go on with: {on}"
