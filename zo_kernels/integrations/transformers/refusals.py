"""Give up when too many steps in a row were refused."""

from __future__ import annotations

from zo_kernels import ZeroOrderOptimizer

MOST_IN_A_ROW = 10


class Diverged(RuntimeError):
    """Too many steps in a row were refused: the run has diverged."""


class Refusals:
    """Watches an optimizer for steps refused in a row."""

    def __init__(self, optimizer: ZeroOrderOptimizer):
        self.optimizer = optimizer
        self._steps = self._refused = 0  # at the last check that saw a step which was not refused

    def check(self) -> None:
        """Check after every step or every few steps. Waits for a GPU.

        Raises Diverged if at least 10 steps in a row were refused.
        """
        steps, refused = self.optimizer.step_count, self.optimizer.refused_steps
        in_a_row = steps - self._steps
        if refused - self._refused < in_a_row:
            self._steps, self._refused = steps, refused
        elif in_a_row >= MOST_IN_A_ROW:
            group = self.optimizer.param_groups[0]
            raise Diverged(
                f"the last {in_a_row} of {steps} steps were refused, since a loss was not finite or the update too "
                f"large for the weights: the run has diverged. Lower learning_rate, which is {group['lr']} now, eps, "
                f"which is {group['eps']}, or weight_decay, which is {group['weight_decay']}"
            )
