"""Checks the calls of a closure for signs that a run goes wrong."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..trajectory import TWO_SIDED, Difference
from ..warn import Warner
from ..weights.tables import Weights
from . import first_order
from .losses import Closure
from .randomness import Draws, Randomness
from .resolution import COARSE, NARROW, narrow_loss_message


class Closures:
    """Checks the calls of an optimizer's closures, and reports each kind of mistake once."""

    def __init__(self, warner: Warner, module: nn.Module | None):
        self._warner, self._randomness, self._draws = warner, Randomness(warner, module), Draws(warner)

    def begin(self, weights: Weights, step: int) -> None:
        """Run the checks that come before a step, and choose those of the step.

        Args:
            weights: the tables of the step.
            step: steps taken with these tables. Costly checks run at steps 0, 1, 2, 4, 8, ...

        Raises:
            ValueError: see `Warner`.
        """
        due = step & (step - 1) == 0
        if due or weights.weights[step % len(weights.weights)].parameter.grad is not None:
            first_order.check(self._warner, weights.weights, step, due)
        if due:
            self._randomness.begin()
            self._draws.begin()

    def wrap(self, closure: Closure, eps: float, difference: Difference = TWO_SIDED) -> Closure:
        """Return a closure that does the same and runs the checks. It raises ValueError where `Warner` does."""
        called = self._randomness.called() if self._randomness.found else None

        def watched() -> Any:
            try:
                loss = self._draws.call(closure, self._randomness.may_draw) if self._draws.due else closure()
            except RuntimeError as error:
                if "does not require grad and does not have a grad_fn" not in str(error):
                    raise
                raise ValueError(
                    "closure: expected it to return the loss, and no more, but it calls backward(), and there are no "
                    "gradients within a step; remove zero_grad() and backward()"
                ) from error
            if isinstance(loss, Tensor) and loss.dtype in NARROW and not self._warner.warned(COARSE):
                self._warner.warn(COARSE, narrow_loss_message(loss, eps, difference))
            if called is not None:
                called()
            return loss

        return watched
