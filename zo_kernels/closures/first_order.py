"""Loops that were written for gradients, of which a zeroth-order optimizer sees only the last batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

from ..warn import Warner
from ..weights.tables import Weight

_GRADIENTS, _ACCUMULATE = "gradients", "accumulation"


def look(warner: Warner, weights: Sequence[Weight], step: int, due: bool) -> None:
    """For gradients that somebody computed, of one weight in each step, or of all; and for accelerate's accumulation.

    Raises:
        ValueError: see `Warner`.
    """
    for w in weights if due else [weights[step % len(weights)]]:
        if w.parameter.grad is not None and not warner.warned(_GRADIENTS):
            warner.warn(
                _GRADIENTS,
                f"{w.name}: it has a .grad, which this optimizer does not read: loss.backward() is of no use, nor are "
                "gradients of several micro-batches, of which only those count that the step's own closure goes over. "
                "Leave backward() away, and put all micro-batches of a step into its closure; in Lightning, set "
                "automatic_optimization to False and call step(closure) yourself (gradients that are left over from "
                "something else: zero_grad())",
            )
    if due and "accelerate.optimizer" in sys.modules and (n := _accumulated()) > 1:
        warner.warn(
            _ACCUMULATE,
            f"accelerate: expected gradient_accumulation_steps=1, got {n}: it calls this optimizer in one of {n} "
            "micro-batches only, and the closures of the others are never called; go over all micro-batches within one "
            "closure",
        )


def _accumulated() -> int:
    """Micro-batches of which accelerate takes one to step with, if it is accelerate that took this step; else 1."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    if frame is None:
        return 1
    state = getattr(frame.f_locals.get("self"), "gradient_state", None)
    n = getattr(state, "num_steps", 1)
    return n if isinstance(n, int) else 1
