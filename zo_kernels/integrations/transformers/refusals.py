"""Steps that were refused, and when to give up."""

from __future__ import annotations

from zo_kernels import ZeroOrderOptimizer

MOST_IN_A_ROW = 10


class Diverged(RuntimeError):
    """So many steps in a row were refused that going on is pointless."""


class Refusals:
    """Watches an optimizer for steps refused in a row."""

    def __init__(self, optimizer: ZeroOrderOptimizer):
        self.optimizer = optimizer
        self._steps = self._refused = 0  # when not all steps since the call before had been refused

    def check(self) -> None:
        """To be called after every step, or after every few; waits for those of a GPU.

        Raises Diverged if all steps since an earlier call were refused, and they are at least 10.
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
