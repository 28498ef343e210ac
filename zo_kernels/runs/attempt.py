"""Steps one at a time. Whatever exception ends a step, it was taken whole and recorded, or the weights are restored."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from sys import _getframe
from threading import get_ident
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch

from ..closures.losses import Refused
from ..interrupts import at_once, signals_held
from ..trajectory import Kind
from ..weights.groups import eps_of
from ..weights.tables import Weights
from .run import VISIT, Progress, Run

# Seconds before each try to restore the weights: exceptions may come from outside, or another thread make a pass over
# the same memory.
_PAUSES = (0.0, 0.0, 1e-3, 1e-2, 0.1)
Visit = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class HasRun(Protocol):
    """An optimizer, or what takes steps for it."""

    _run: Run


def alone(what: str) -> Callable[[Method], Method]:
    """For a method of what has a run: no other such method can begin on that run meanwhile.

    There is no lock that an exception might leave behind, whatever line it comes at. Each visit is a dictionary.
    Whoever makes its own the "next" one of a visit that is over is inside; `setdefault` lets one thread do so. A visit
    is over when it says so, or when its frame is not on its thread's stack any more, which is looked at only where
    somebody would be refused otherwise.

    Raises:
        RuntimeError: something is inside, in another thread or further up in this one. Nothing is changed.
    """

    def decorated(method: Method) -> Method:
        @functools.wraps(method)
        def guarded(self: HasRun, *args: Any, **kwargs: Any) -> Any:
            attributes = self._run.__dict__
            mine: Visit = {"what": what, "thread": get_ident(), "frame": _getframe()}
            last = attributes.get(VISIT)
            if last is None:
                last = attributes.setdefault(VISIT, {"over": True})
            if "over" not in last or last.setdefault("next", mine) is not mine:
                _follow(last, mine)
            try:
                attributes[VISIT] = mine
                return method(self, *args, **kwargs)
            finally:
                mine["over"] = True
                mine["frame"] = None  # which holds the closure

        result: Any = guarded
        return result

    return decorated


def _follow(last: Visit, mine: Visit) -> None:
    """From a visit to the last one there is, which must be over, and come after it."""
    while last is not mine:
        if "over" not in last and _goes_on(last):
            who = "another thread is" if last["thread"] != mine["thread"] else "this thread is already (in a closure?)"
            raise RuntimeError(
                f"{mine['what']}: {who} in {last['what']} of this optimizer, which does one thing at a time; nothing "
                "was changed"
            )
        last = last.setdefault("next", mine)


def _goes_on(visit: Visit) -> bool:
    """Whether its frame is on the stack of its thread."""
    frame = sys._current_frames().get(visit["thread"])
    while frame is not None:
        if frame is visit["frame"]:
            return True
        frame = frame.f_back
    return False


class Attempt:
    """At one step, without gradients; a context manager. How far it got is `Run.progress`.

    Args:
        groups: the optimizer's parameter groups.
    """

    def __init__(self, run: Run, groups: Sequence[Mapping[str, Any]]):
        self._run, self._groups = run, groups
        self._gradients = torch.is_grad_enabled()
        self.progress = Progress()

    def __enter__(self) -> Progress:
        run = self._run
        if run.progress is not None:
            _leave(run, run.progress)
        run.attempts += 1
        run.progress = self.progress
        return self.progress

    def begin(self) -> None:
        """No gradients from here on; not in `__enter__`, after which alone `__exit__` is sure to come."""
        torch._C._set_grad_enabled(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.end(error)
            self._run.progress = None
        finally:
            torch._C._set_grad_enabled(self._gradients)
        if isinstance(error, Refused):
            known = not self._run.lost
            lost = "; load the weights again, from a checkpoint or the trajectory"
            now = ", the weights are restored" if known else lost
            raise error.error(f"{error.of}{error}; the step is skipped{now}") from None

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
                self._run.recording.forget_versions()
                self._run.progress = None
        if another is not None:
            raise another

    def _put_right(self, error: BaseException) -> None:
        run, progress, weights = self._run, self.progress, self._run.trained.weights
        if progress.recorded is not None:
            if weights is not None:
                weights.written()
                self._write_down(weights)
            return
        torch._C._set_grad_enabled(False)
        if progress.probes is None:
            progress.seen = True  # nothing has moved: if weights changed, others did it
            # An argument that is wrong is no step that was interrupted.
            if isinstance(error, (ValueError, TypeError)) or weights is None or not run.recording.has_begun:
                return
        else:
            assert weights is not None
            if not run.restore(progress.probes, weights):
                return
            weights.written()
            with suppress(Refused, ValueError, OSError):  # which may be the error already; the next step writes
                run.note_writes(weights, eps_of(self._groups), self._groups)
        at_once(run.failing(progress, Kind.REFUSED if isinstance(error, Refused) else Kind.INTERRUPTED))
        self._write_down(weights)

    def _write_down(self, weights: Weights) -> None:
        with suppress(OSError, RuntimeError):  # the next step writes it, or raises
            self._run.taken(self.progress, weights)


def _leave(run: Run, progress: Progress) -> None:
    """Of two exceptions at once, the second kept an attempt from its end: what it moved is not known to be there, since
    somebody may have loaded weights meanwhile.
    """
    place = run.perturbation.place
    if place is not None and place.is_still():
        place.restore()  # the weights are θ, whoever wrote it
    elif progress.recorded is None and progress.probes is not None:
        run.give_up()


def attempted(step: Method) -> Method:
    """An optimizer's `step` within an `Attempt`, one at a time. Around it are PyTorch's own wrapper and the hooks that
    it calls; what ends these before the step has begun is recorded, too.
    """

    @alone("step")
    @functools.wraps(step)
    def alone_within(self: Any, *closures: Any, **named: Any) -> Any:
        gradients = torch.is_grad_enabled()
        attempt = Attempt(self._run, self.param_groups)
        try:
            with attempt:
                attempt.begin()
                return step(self, *closures, **named)
        finally:  # again, should an exception have come before the attempt's end could begin
            torch._C._set_grad_enabled(gradients)

    hooked = torch.optim.Optimizer.profile_hook_step(alone_within)

    @functools.wraps(step)
    def outermost(self: Any, *closures: Any, **named: Any) -> Any:
        run: Run = self._run
        attempts = run.attempts
        try:
            overridden = getattr(type(self).step, "attempted", None) is not step  # by one for which PyTorch calls hooks
            return (alone_within if overridden else hooked)(self, *closures, **named)
        except BaseException as error:
            if run.attempts == attempts and run.progress is None:
                run.interrupted_before(error)
            raise

    result: Any = outermost
    result.attempted = step
    result.hooked = True  # PyTorch puts its wrapper around what has not this
    return result
