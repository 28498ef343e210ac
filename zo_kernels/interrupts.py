"""Exceptions that come from outside at any moment: raised by a signal's handler (Ctrl-C, a time limit), or set by
another thread. Python raises them between two of its own operations, never within a C function.
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
    # The C module under `signal`, which first looks up each handler in an enum: that takes five times as long as the
    # rest of `signals_held`.
    import _signal as _plain  # type: ignore[import-not-found, no-redef]
except ImportError:  # other Pythons than CPython may lack it
    _plain = signal

_SIGNALS = sorted(map(int, signal.valid_signals()))
_called = operator.methodcaller("__call__")


def at_once(calls: Iterable[Call]) -> None:
    """Call C functions one after the other, with no Python operation between them.

    An exception from outside then comes before the first or after the last. `functools.partial` of a C function counts
    as one. The results are dropped.
    """
    deque(map(_called, calls), maxlen=0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay the handlers of signals to the end of the block.

    Outside of the main thread this does nothing: Python runs handlers in the main thread alone.
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
        with ExitStack() as stack:  # runs every handler, even if one raises
            for number, frame in came.items():
                stack.callback(handlers[number], number, frame)
