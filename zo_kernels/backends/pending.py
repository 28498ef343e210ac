"""Values on their way from a device, and what is to be done with them once they are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..interrupts import Call, at_once


class Pending:
    """A queue: what was put in first is done first."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[list[Any]], Sequence[Call]]]] = deque()

    def putting(self, values: Tensor, then: Callable[[list[Any]], Sequence[Call]]) -> Call:
        """A call that puts in the values of a tensor of one dimension, as they are now, and what is to be called with
        them once they are known. Nobody waits for them here.

        Args:
            then: returns C functions, which are called when the values are taken out, or not at all.
        """
        event = None
        if values.is_cuda:
            there, values = values, torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            values.copy_(there, non_blocking=True)
            event = torch.cuda.current_stream(there.device).record_event()
        return partial(self._queue.append, (values, event, then))

    def put(self, values: Tensor, then: Callable[[list[Any]], None]) -> None:
        """As `putting`, at once, and `then` is called with what is known."""

        def called(known: list[Any]) -> tuple[Call, ...]:
            then(known)
            return ()

        self.putting(values, called)()

    def __len__(self) -> int:
        return len(self._queue)

    def oldest(self) -> torch.cuda.Event | None:
        """What its values wait for; None if they are known, or if there are none."""
        return self._queue[0][1] if self._queue else None

    def work_off(self, *, wait: bool) -> None:
        """Do what can be done: all of it, or with `wait` False only what needs no waiting."""
        while self._queue:
            values, event, then = self._queue[0]
            if event is not None and not wait and not event.query():
                return
            if event is not None:
                event.synchronize()
            calls: Sequence[Call] = ()
            try:
                calls = then(values.tolist())
            except Exception:  # it is said once
                self._queue.popleft()
                raise
            at_once([*calls, self._queue.popleft])
