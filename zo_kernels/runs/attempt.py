"""Takes steps one at a time. Whatever exception comes, a step is whole and recorded, or the weights are restored."""

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

# Seconds to wait before each attempt to restore the weights. One may fail because another exception comes from outside,
# or because another thread makes a pass over the same memory.
_PAUSES = (0.0, 0.0, 1e-3, 1e-2, 0.1)
Visit = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class HasRun(Protocol):
    """An optimizer, or a `GraphedStep` of one."""

    _run: Run


def alone(what: str) -> Callable[[Method], Method]:
    """Decorate a method so that of all decorated methods only one runs on the same `Run` at a time.

    A lock would stay locked if an exception came between taking it and the `try`. So there is none. Each call makes a
    visit, a dictionary, and enters by making it the "next" of a visit that is over; `setdefault` lets only one thread
    do so. A visit is over when it is marked so, or when its frame is no longer on its thread's stack. That is checked
    only before a call would raise.

    Args:
        what: the method's name, for the message.

    Raises:
        RuntimeError: another such method runs, in another thread or further up in this one. Nothing is changed.
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
                mine["frame"] = None  # the frame keeps the closure alive

        result: Any = guarded
        return result

    return decorated


def _follow(last: Visit, mine: Visit) -> None:
    """Follow the chain of visits to its end, and append `mine`. Raise if a visit on the way is not over."""
    while last is not mine:
        if "over" not in last and _goes_on(last):
            who = "another thread is" if last["thread"] != mine["thread"] else "this thread is already (in a closure?)"
            raise RuntimeError(
                f"{mine['what']}: {who} in {last['what']} of this optimizer, which does one thing at a time; nothing "
                "was changed"
            )
        last = last.setdefault("next", mine)


def _goes_on(visit: Visit) -> bool:
    """Say whether the visit's frame is on the stack of its thread."""
    frame = sys._current_frames().get(visit["thread"])
    while frame is not None:
        if frame is visit["frame"]:
            return True
        frame = frame.f_back
    return False


class Attempt:
    """One step, as a context manager. If an exception ends the block, it restores and records what is needed.

    Args:
        run: the run. Its `progress` says how far the step has come.
        groups: the optimizer's parameter groups.
    """

    def __init__(self, run: Run, groups: Sequence[Mapping[str, Any]]):
        self._run, self._groups = run, groups
        self._gradients = torch.is_grad_enabled()
        self.progress = Progress()

    def __enter__(self) -> Progress:
        run = self._run
        if run.progress is not None:
            _abandon(run, run.progress)
        run.attempts += 1
        run.progress = self.progress
        return self.progress

    def begin(self) -> None:
        """Turn gradients off. `__enter__` must not do so: an exception within it would leave them off."""
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
            now = ", the weights are restored"
            if self._run.lost:
                now = "; load the weights again, from a checkpoint or the trajectory"
            raise error.error(f"{error.of}{error}; the step is skipped{now}") from None

    def end(self, error: BaseException) -> None:
        """Handle an exception: restore the weights and record that, unless the step was taken whole.

        If another exception comes meanwhile, this tries again, and raises it afterwards.
        """
        another: BaseException | None = None
        for pause in _PAUSES:
            try:
                with signals_held():
                    time.sleep(pause)
                    self._restore_and_record(error)
                break
            except BaseException as later:  # the next try goes on where this one ended
                another = later
        else:
            if isinstance(another, Exception):  # all tries failed: treat the weights as changed by others
                self._run.recording.forget_versions()
                self._run.progress = None
        if another is not None:
            raise another

    def _restore_and_record(self, error: BaseException) -> None:
        run, progress, weights = self._run, self.progress, self._run.trained.weights
        if progress.recorded is not None:
            if weights is not None:
                weights.written()
                self._write_record(weights)
            return
        torch._C._set_grad_enabled(False)
        if progress.probes is None:
            progress.seen = True  # nothing has moved: if weights changed, something else changed them
            # An error in an argument does not interrupt a step.
            if isinstance(error, (ValueError, TypeError)) or weights is None or not run.recording.has_begun:
                return
        else:
            assert weights is not None
            if not run.restore(progress.probes, weights):
                return
            weights.written()
            with suppress(Refused, ValueError, OSError):  # `error` matters more; the next step writes
                run.note_writes(weights, eps_of(self._groups), self._groups)
        at_once(run.failing(progress, Kind.REFUSED if isinstance(error, Refused) else Kind.INTERRUPTED))
        self._write_record(weights)

    def _write_record(self, weights: Weights) -> None:
        with suppress(OSError, RuntimeError):  # the next step writes the record, or raises
            self._run.taken(self.progress, weights)


def _abandon(run: Run, progress: Progress) -> None:
    """Give up an earlier step whose end a second exception prevented.

    Its probes cannot restore the weights any more, since somebody may have loaded others since.
    """
    place = run.perturbation.place
    if place is not None and place.is_still():
        place.restore()  # in the forward: the weights are θ
    elif progress.recorded is None and progress.probes is not None:
        run.give_up()


def attempted(step: Method) -> Method:
    """Decorate an optimizer's `step`: it runs within an `Attempt`, one at a time, inside PyTorch's wrapper and hooks.

    If an exception from outside ends the wrapper or a hook before the step has begun, it is recorded too.
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
        finally:  # again, in case an exception came before `Attempt.__exit__` could begin
            torch._C._set_grad_enabled(gradients)

    hooked = torch.optim.Optimizer.profile_hook_step(alone_within)

    @functools.wraps(step)
    def outermost(self: Any, *closures: Any, **named: Any) -> Any:
        run: Run = self._run
        attempts = run.attempts
        try:
            # If a subclass overrides `step`, PyTorch wraps the override, and calls the hooks there.
            overridden = getattr(type(self).step, "attempted", None) is not step
            return (alone_within if overridden else hooked)(self, *closures, **named)
        except BaseException as error:
            if run.attempts == attempts and run.progress is None:
                run.interrupted_before(error)
            raise

    result: Any = outermost
    result.attempted = step
    result.hooked = True  # PyTorch wraps every `step` without this attribute
    return result
