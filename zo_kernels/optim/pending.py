"""Values on their way from a device, and what is to be done with them once they are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Pending:
    """A queue: what was put in first is done first."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[list[Any]], None]]] = deque()

    def put(self, values: Tensor, then: Callable[[list[Any]], None]) -> None:
        """Call `then` with the values of a tensor of one dimension, once they are known. Nobody waits for them here."""
        event = None
        if values.is_cuda:
            there, values = values, torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            values.copy_(there, non_blocking=True)
            event = torch.cuda.current_stream(there.device).record_event()
        self._queue.append((values, event, then))

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
            self._queue.popleft()  # first: `then` may fail, having done what it should
            then(values.tolist())
