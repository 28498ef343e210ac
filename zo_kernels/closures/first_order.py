"""Finds training loops written for gradients, where a zeroth-order optimizer would see the last batch only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

from ..warn import Warner
from ..weights.tables import Weight

_GRADIENTS, _ACCUMULATE = "gradients", "accumulation"  # topics of the reports


def look(warner: Warner, weights: Sequence[Weight], step: int, due: bool) -> None:
    """Report gradients that somebody computed, and accelerate's gradient accumulation.

    Args:
        weights: the trained weights.
        step: which of them to look at: one in each step.
        due: look at all of them, and for accelerate.

    Raises:
        ValueError: see `Warner`.
    """
    for w in weights if due else [weights[step % len(weights)]]:
        if w.parameter.grad is not None and not warner.warned(_GRADIENTS):
            warner.warn(
                _GRADIENTS,
                f"{w.name}: it has a .grad, which this optimizer does not read: loss.backward() has no effect, and "
                "only the micro-batches inside the step's own closure count. Remove backward(), and put all "
                "micro-batches of a step into its closure; in Lightning, set automatic_optimization to False and call "
                "step(closure) yourself (if the gradients are left over from something else, call zero_grad())",
            )
    if due and "accelerate.optimizer" in sys.modules and (n := _accumulated()) > 1:
        warner.warn(
            _ACCUMULATE,
            f"accelerate: expected gradient_accumulation_steps=1, got {n}: it calls this optimizer for one of {n} "
            "micro-batches only, and the closures of the others are never called; loop over all micro-batches within "
            "one closure",
        )


def _accumulated() -> int:
    """How many micro-batches accelerate accumulates for each step; 1 if it is not accelerate that calls this step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.optimizer":
        frame = frame.f_back
    if frame is None:
        return 1
    state = getattr(frame.f_locals.get("self"), "gradient_state", None)
    n = getattr(state, "num_steps", 1)
    return n if isinstance(n, int) else 1
