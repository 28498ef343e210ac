"""When to stop a run of a sweep early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 20


@dataclass(frozen=True)
class StopRule:
    """Stops a run when its loss has risen by more than `margin` or is not finite."""

    margin: float

    def reason(self, losses: Sequence[float | None], dev_before: float, dev: float) -> str | None:
        """Why to stop now; None to continue.

        Args:
            losses: the losses of all steps so far; None for a refused step.
            dev_before: the development loss before training.
            dev: the development loss at the last evaluation.
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
    """The mean over steps that were not refused."""
    taken = [loss for loss in losses if loss is not None]
    return sum(taken) / len(taken)
