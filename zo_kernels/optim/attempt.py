"""A step that is being taken: whatever exception ends it, it was taken whole and recorded, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..trajectory import Record
from .losses import Refused
from .probes import Probes

if TYPE_CHECKING:
    from .recorded import RecordedSteps


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._optimizer._mend(self, error)
        finally:
            torch.set_grad_enabled(self._gradients)
        if isinstance(error, Refused):
            raise error.error(f"closure: {error}; the step is refused, the weights are restored") from None


def attempted(step: Callable[..., Any]) -> Callable[..., Any]:
    """Of an optimizer's `step`, to which its `Attempt` comes as `optimizer._attempt`: all of it is within, PyTorch's own
    wrapper and the hooks that it calls, too.
    """
    within = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def outermost(self: Any, *closures: Any, **named: Any) -> Any:
        with Attempt(self) as attempt:
            attempt.begin()
            self._attempt = attempt
            overridden = type(self).step is not outermost  # by a step for which PyTorch calls them
            try:
                return (step if overridden else within)(self, *closures, **named)
            finally:
                del self._attempt  # which knows the optimizer: they would keep each other alive

    outermost.hooked = True  # type: ignore[attr-defined] - PyTorch puts its wrapper around what has not this
    return outermost
