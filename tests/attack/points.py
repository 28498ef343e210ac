"""An exception at a chosen moment: before the k-th instruction that this package executes.

CPython delivers signals and `PyThreadState_SetAsyncExc` at few instructions: after calls, at the start of functions and
at jumps backwards. `realistic` counts these alone; otherwise every instruction counts, which is more than can happen.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import zo_kernels as zo

PACKAGE = os.path.dirname(zo.__file__) + os.sep


class Asynchronous(BaseException):
    """What comes from outside. No `Exception`: nobody has a reason to catch it by that name."""


def _may_deliver(name: str) -> bool:
    return name.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "PRECALL", "SEND"))


_DELIVERS = [_may_deliver(name) for name in dis.opname]


class Counter:
    """Counts the instructions in frames of this package, and raises at one.

    Args:
        at: which, from 1 on; 0: none.
        realistic: count those alone at which CPython looks for signals.
    """

    def __init__(self, at: int = 0, *, realistic: bool = True):
        self.at, self.realistic = at, realistic
        self.counted = 0
        self.where = ""
        self._before: dict[int, int] = {}  # frame -> its last instruction

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._before[id(frame)] = -1
        return self._in_frame

    def _in_frame(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "return":
            self._before.pop(id(frame), None)
        if event != "opcode":
            return self._in_frame
        last, self._before[id(frame)] = self._before.get(id(frame), -1), frame.f_lasti
        if self.realistic and last >= 0 and not _DELIVERS[frame.f_code.co_code[last]]:
            return self._in_frame
        self.counted += 1
        if self.counted == self.at:
            name = frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name
            self.where = f"{os.path.relpath(frame.f_code.co_filename, PACKAGE)}:{frame.f_lineno} in {name}"
            raise Asynchronous(self.where)
        return self._in_frame


@contextmanager
def counting(counter: Counter) -> Iterator[Counter]:
    """While the block runs, but not where a trace function is set already."""
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        yield counter
    finally:
        sys.settrace(before)
