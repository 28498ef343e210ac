"""Copies of values from a device, without waiting for it, and what to do with each when it arrives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..interrupts import Call, at_once


class Pending:
    """A queue of values that are being copied from a device, each with a function to call when it is there."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[list[Any]], Sequence[Call]]]] = deque()

    def putting(self, values: Tensor, then: Callable[[list[Any]], Sequence[Call]]) -> Call:
        """Begin to copy a tensor's values; return the C function that puts them in the queue.

        Args:
            values: one-dimensional; copied as they are now, without waiting.
            then: called with the values once they are there. It returns C functions, which are called together with
                the removal from the queue, or not at all.
        """
        event = None
        if values.is_cuda:
            there, values = values, torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            values.copy_(there, non_blocking=True)
            event = torch.cuda.current_stream(there.device).record_event()
        return partial(self._queue.append, (values, event, then))

    def put(self, values: Tensor, then: Callable[[list[Any]], None]) -> None:
        """Put values in the queue at once; `then` is called with them once they are there."""

        def called(known: list[Any]) -> tuple[Call, ...]:
            then(known)
            return ()

        self.putting(values, called)()

    def __len__(self) -> int:
        return len(self._queue)

    def oldest(self) -> torch.cuda.Event | None:
        """The event that the oldest values wait for; None if they are there, or if the queue is empty."""
        return self._queue[0][1] if self._queue else None

    def work_off(self, *, wait: bool) -> None:
        """Work through the queue in order: all of it, or, if not `wait`, as far as values are there."""
        while self._queue:
            values, event, then = self._queue[0]
            if event is not None and not wait and not event.query():
                return
            if event is not None:
                event.synchronize()
            calls: Sequence[Call] = ()
            try:
                calls = then(values.tolist())
            except Exception:  # an error is raised once
                self._queue.popleft()
                raise
            at_once([*calls, self._queue.popleft])
