"""Exceptions that come from outside at any moment: from a signal's handler (Ctrl-C, a time limit), or set by another
thread. Python raises them between two of its own operations, but never within a C function.
"""

from __future__ import annotations

import operator
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

Call = Callable[[], object]

_plain: Any
try:
    # What `signal` wraps: there, each call first looks for the handler among the members of an enum, in vain, which
    # takes five times as long as all else here.
    import _signal as _plain  # type: ignore[import-not-found, no-redef]
except ImportError:  # CPython has it; others need not
    _plain = signal

_SIGNALS = sorted(map(int, signal.valid_signals()))
_called = operator.methodcaller("__call__")


def at_once(calls: Iterable[Call]) -> None:
    """Make calls one after the other with nothing of Python's own between them, so that an exception from outside comes
    before the first of them or after the last, provided that they are C functions (`functools.partial` is one, too).
    Their results are dropped.
    """
    deque(map(_called, calls), maxlen=0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that Python handles have their effect at the end of the block, not within. Without effect outside of
    the main thread, which is the only one that they reach.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {n: h for n in _SIGNALS if callable(h := _plain.getsignal(n))}
    came: dict[int, FrameType | None] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came[number] = frame

    try:
        for number in handlers:
            _plain.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            if _plain.getsignal(number) is note:
                _plain.signal(number, handler)
        with ExitStack() as stack:  # each of them, whatever another raises
            for number, frame in came.items():
                stack.callback(handlers[number], number, frame)
