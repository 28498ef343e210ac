"""When a run of a sweep is not worth going on with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 20


@dataclass(frozen=True)
class StopRule:
    """A run is stopped when its loss has risen by more than `margin`, or is no number any more."""

    margin: float

    def reason(self, losses: Sequence[float | None], dev_before: float, dev: float) -> str | None:
        """Why to stop after the steps that had these losses (None: refused), or None to go on.

        Args:
            losses: of all steps so far.
            dev_before: loss on the development examples before training.
            dev: at the last evaluation.
        """
        last = losses[-_WINDOW:]
        if len(last) == _WINDOW and all(loss is None for loss in last):
            return f"{_WINDOW} steps refused in a row"
        if not math.isfinite(dev):
            return "dev loss not finite"
        if dev > dev_before + self.margin:
            return f"dev loss {dev:.3g}, from {dev_before:.3g}"
        if len(losses) >= 2 * _WINDOW:
            before, now = _mean(losses[:_WINDOW]), _mean(last)
            if now > before + self.margin:
                return f"training loss {now:.3g}, from {before:.3g}"
        return None


def _mean(losses: Sequence[float | None]) -> float:
    """Of the steps that were not refused."""
    taken = [loss for loss in losses if loss is not None]
    return sum(taken) / len(taken)
