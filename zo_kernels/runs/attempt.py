"""A step that is being taken: whatever exception ends it, it was taken whole and recorded, or not at all."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..interrupts import at_once, signals_held
from ..trajectory import Kind, Record
from .alone import alone
from ..closures.losses import Refused
from ..perturbation.in_place import Probes
from ..weights.tables import Weights

if TYPE_CHECKING:
    from .recorded import RecordedSteps

# Seconds before each try to restore the weights: exceptions may come from outside, or another thread make a pass over
# the same memory.
_PAUSES = (0.0, 0.0, 1e-3, 1e-2, 0.1)
Step = TypeVar("Step", bound=Callable[..., Any])


class Attempt:
    """At one step, without gradients; a context manager.

    Attributes:
        probes: what moves the weights; None while nothing can have moved.
        recorded: the step's record, from the moment on when it was taken, refused or interrupted, and noted as such.
        seen: whether what it did to the weights is known to be no change by others.
    """

    probes: Probes | None = None
    recorded: Record | None = None
    seen = False

    def __init__(self, optimizer: RecordedSteps):
        self._optimizer, self._gradients = optimizer, torch.is_grad_enabled()

    def __enter__(self) -> Attempt:
        optimizer = self._optimizer
        if optimizer._attempt is not None:
            optimizer._attempt.leave()
        optimizer._attempts += 1
        optimizer._attempt = self
        return self

    def begin(self) -> None:
        """No gradients from here on; not in `__enter__`, after which alone `__exit__` is sure to come."""
        torch._C._set_grad_enabled(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.end(error)
            self._optimizer._attempt = None  # which knows it: they would keep each other alive
        finally:
            torch._C._set_grad_enabled(self._gradients)
        if isinstance(error, Refused):
            known = not self._optimizer._torn
            now = ", the weights are restored" if known else "; load weights anew, from a checkpoint or the trajectory"
            raise error.error(f"{error.of}{error}; the step is refused{now}") from None

    def leave(self) -> None:
        """Of two exceptions at once, the second kept this one from its end: what it moved is not known to be there,
        since somebody may have loaded weights meanwhile.
        """
        engine = self._optimizer._in_forward
        if engine is not None and engine.is_still():
            engine.restore()  # the weights are θ, whoever wrote it
        elif self.recorded is None and self.probes is not None:
            self._optimizer._give_up()

    def end(self, error: BaseException) -> None:
        """After whatever exception, and whenever it came: restore the weights and record that, unless the step was
        taken whole. Should another one come meanwhile, it is raised when that is done.
        """
        another: BaseException | None = None
        for pause in _PAUSES:
            try:
                with signals_held():
                    time.sleep(pause)
                    self._put_right(error)
                break
            except BaseException as later:  # what is done already is not done twice
                another = later
        else:
            if isinstance(another, Exception):  # it cannot be: the trajectory ends here, and the weights are others
                self._optimizer._recording.forget_versions()
                self._optimizer._attempt = None
        if another is not None:
            raise another

    def _put_right(self, error: BaseException) -> None:
        optimizer, weights = self._optimizer, self._optimizer._weights
        if self.recorded is not None:
            if weights is not None:
                weights.written()
                self._write_down(weights)
            return
        torch._C._set_grad_enabled(False)
        if self.probes is None:
            self.seen = True  # nothing has moved: if weights changed, others did it
            # An argument that is wrong is no step that was interrupted.
            if isinstance(error, (ValueError, TypeError)) or weights is None or not optimizer._recording.has_begun:
                return
        else:
            assert weights is not None
            if not optimizer._restore(self.probes, weights):
                return
            weights.written()
            with suppress(Refused, ValueError, OSError):  # which may be the error already; the next step writes
                optimizer._note_writes(weights, optimizer._eps())
        at_once(optimizer._failing(self, Kind.REFUSED if isinstance(error, Refused) else Kind.INTERRUPTED))
        self._write_down(weights)

    def _write_down(self, weights: Weights) -> None:
        with suppress(OSError, RuntimeError):  # the next step writes it, or raises
            self._optimizer._taken(self, weights)


def attempted(step: Step) -> Step:
    """An optimizer's `step` within an `Attempt`, which it finds as `self._attempt`, one at a time. Around it are
    PyTorch's own wrapper and the hooks that it calls; what ends these before the step has begun is recorded, too.
    """

    @alone("step")
    @functools.wraps(step)
    def alone_within(self: Any, *closures: Any, **named: Any) -> Any:
        gradients = torch.is_grad_enabled()
        try:
            with Attempt(self) as attempt:
                attempt.begin()
                return step(self, *closures, **named)
        finally:  # again, should an exception have come before the attempt's end could begin
            torch._C._set_grad_enabled(gradients)

    hooked = torch.optim.Optimizer.profile_hook_step(alone_within)

    @functools.wraps(step)
    def outermost(self: Any, *closures: Any, **named: Any) -> Any:
        attempts = self._attempts
        try:
            overridden = getattr(type(self).step, "attempted", None) is not step  # by one for which PyTorch calls hooks
            return (alone_within if overridden else hooked)(self, *closures, **named)
        except BaseException as error:
            if self._attempts == attempts and self._attempt is None:
                self._interrupted_before(error)
            raise

    result: Any = outermost
    result.attempted = step
    result.hooked = True  # PyTorch puts its wrapper around what has not this
    return result
