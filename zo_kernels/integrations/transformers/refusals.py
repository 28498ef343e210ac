"""Steps that were refused because a loss was not finite, and when to give up."""

from __future__ import annotations

from zo_kernels import ZeroOrderOptimizer

MOST_IN_A_ROW = 10


class Diverged(RuntimeError):
    """So many steps in a row were refused that going on is pointless."""


class Refusals:
    """Watches an optimizer for steps refused in a row."""

    def __init__(self, optimizer: ZeroOrderOptimizer):
        self._optimizer = optimizer
        self._steps, self._refused = optimizer.step_count, optimizer.refused_steps

    def check(self) -> None:
        """Raise `Diverged` if at least 10 steps since this was called first, and all since some call, were refused.

        Steps of a GPU are waited for.
        """
        steps, refused = self._optimizer.step_count, self._optimizer.refused_steps
        in_a_row = steps - self._steps
        if refused - self._refused < in_a_row:
            self._steps, self._refused = steps, refused
        elif in_a_row >= MOST_IN_A_ROW:
            group = self._optimizer.param_groups[0]
            raise Diverged(
                f"the last {in_a_row} of {steps} steps had a loss that is not finite: the run has diverged. "
                f"Lower learning_rate, which is {group['lr']} now, or eps, which is {group['eps']}"
            )
