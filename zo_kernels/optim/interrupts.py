"""Ctrl-C may come at any moment, also between a pass over the weights and the note that it was made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_plain: Any
try:
    # What `signal` wraps: there, each call first looks for the handler among the members of an enum, in vain, which
    # takes five times as long as all else here, and a step has several blocks.
    import _signal as _plain  # type: ignore[import-not-found, no-redef]
except ImportError:  # CPython has it; others need not
    _plain = signal

_SIGINT = int(signal.SIGINT)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let SIGINT have its effect at the end of the block, not within. Without effect outside of the main thread, which
    is the only one that it reaches.
    """
    handler = _plain.getsignal(_SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    _plain.signal(_SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        _plain.signal(_SIGINT, handler)
        if came:
            handler(*came[-1])
