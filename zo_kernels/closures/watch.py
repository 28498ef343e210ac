"""What the calls of a closure tell, beside the losses, of a run that goes wrong."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..warn import Warner
from ..weights.tables import Weights
from . import first_order
from .losses import Closure
from .randomness import Draws, Randomness
from .resolution import COARSE, is_narrow, narrow_loss_message


class Closures:
    """Looks at every call, for as long as there is something left to say."""

    def __init__(self, warner: Warner, module: nn.Module | None):
        self._warner, self._randomness, self._draws = warner, Randomness(warner, module), Draws(warner)

    def begin(self, weights: Weights, step: int) -> None:
        """Before a step.

        Args:
            step: steps taken with these tables of weights. At 0, 1, 2, 4, 8, ... what costs more is looked at, too.

        Raises:
            ValueError: see `Warner`.
        """
        due = step & (step - 1) == 0
        first_order.look(self._warner, weights.weights, step, due)
        self._randomness.begin(due)
        self._draws.begin(due)

    def looked_at(self, closure: Closure, eps: float) -> Closure:
        """To be called in place of the closure; raises ValueError where `Warner` does."""
        called = self._randomness.called()

        def looked() -> Any:
            try:
                loss = self._draws.call(closure, self._randomness.may_draw)
            except RuntimeError as error:
                if "does not require grad and does not have a grad_fn" not in str(error):
                    raise
                raise ValueError(
                    "closure: expected it to return the loss, and no more, but it calls backward(), and there are no "
                    "gradients within a step; leave zero_grad() and backward() away"
                ) from error
            if isinstance(loss, Tensor) and is_narrow(loss) and not self._warner.warned(COARSE):
                self._warner.warn(COARSE, narrow_loss_message(loss, eps))
            if called is not None:
                called()
            return loss

        return looked
