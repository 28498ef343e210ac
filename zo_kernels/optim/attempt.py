"""A step that is being taken: whatever exception ends it, it was taken whole and recorded, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..trajectory import Record
from .losses import Refused
from .probes import Probes

if TYPE_CHECKING:
    from .recorded import RecordedSteps

Step = TypeVar("Step", bound=Callable[..., Any])


class Attempt:
    """At one step, without gradients; a context manager.

    Attributes:
        probes: what moves the weights; None while nothing can have moved.
        recorded: the step's record, from the moment on when it was taken, refused or interrupted, and noted as such.
    """

    probes: Probes | None = None
    recorded: Record | None = None

    def __init__(self, optimizer: RecordedSteps):
        self._optimizer, self._gradients = optimizer, torch.is_grad_enabled()

    def __enter__(self) -> Attempt:
        return self

    def begin(self) -> None:
        """No gradients from here on to the end."""
        torch.set_grad_enabled(False)
        optimizer = self._optimizer
        if optimizer._attempt is not None:  # two exceptions at once, of which the second kept its step from being ended
            optimizer._mend(optimizer._attempt, InterruptedError())
        optimizer._attempt = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._optimizer._mend(self, error)
            self._optimizer._attempt = None  # which knows it: they would keep each other alive
        finally:
            torch.set_grad_enabled(self._gradients)
        if isinstance(error, Refused):
            raise error.error(f"{error.of}{error}; the step is refused, the weights are restored") from None


def attempted(step: Step) -> Step:
    """An optimizer's `step` with all of it within an `Attempt`, PyTorch's own wrapper and the hooks that it calls, too.
    It finds that as `self._attempt`.
    """
    within = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def outermost(self: Any, *closures: Any, **named: Any) -> Any:
        with Attempt(self) as attempt:
            attempt.begin()
            overridden = getattr(type(self).step, "attempted", None) is not step  # by one for which PyTorch calls them
            return (step if overridden else within)(self, *closures, **named)

    result: Any = outermost
    result.attempted = step
    result.hooked = True  # PyTorch puts its wrapper around what has not this
    return result
