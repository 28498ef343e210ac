"""Exceptions that come before a chosen instruction of a step: each must leave the weights that the trajectory gives."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from attack.points import Asynchronous, Counter, counting
from attack.runs import bits_of
from attack.victims import KINDS, Victim
from attack.workers import Result, expect

Case = tuple[str, int, float, bool, float]  # the kind, steps before, where, only real points, where a second one comes


def _cases(count: int, seed: int, realistic: bool, second: bool) -> Iterator[Case]:
    draw = random.Random(seed)
    for i in range(count):
        name = list(KINDS)[i % len(KINDS)]
        yield name, draw.choice(KINDS[name].steps), draw.random(), realistic, draw.random() if second else -1.0


def cases(count: int, seed: int) -> Iterator[Case]:
    """Where CPython delivers signals and exceptions of other threads."""
    return _cases(count, seed, True, False)


def cases_anywhere(count: int, seed: int) -> Iterator[Case]:
    """Before any instruction, also where CPython delivers nothing."""
    return _cases(count, seed, False, False)


def cases_twice(count: int, seed: int) -> Iterator[Case]:
    """The closure raises, and another exception comes while the weights are restored."""
    return _cases(count, seed, True, True)


@cache
def instructions(name: str, steps: int, realistic: bool, failing: bool) -> int:
    """How many a step has that is left alone (but for its closure, which raises in the second call)."""
    victim = Victim(KINDS[name])
    for _ in range(steps):
        victim.step()
    with counting(counter := Counter(realistic=realistic)):
        _disturbed(victim, failing)
    return counter.counted


def _disturbed(victim: Victim, failing: bool) -> None:
    if not failing:
        victim.step()
        return
    with contextlib.suppress(ZeroDivisionError):
        victim.failing_step(2, ZeroDivisionError())


def attempt(case: Case) -> Result:
    name, steps, at, realistic, again = case
    failing = again >= 0
    path = Path("run.zo")
    path.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        number = 1 + int(at * instructions(name, steps, realistic, failing))
        victim = Victim(KINDS[name], path)
        for _ in range(steps):
            victim.step()
        counter = Counter(number, realistic=realistic)
        raised = _leaves(victim, counter, failing)
        when = f"{name}, step {steps}, at {counter.where}"
        expect(not raised or not isinstance(raised, Exception), f"swallowed: {when}: {raised!r} came of it")
        if failing and victim.check(when).startswith("left moved"):
            _told_at_the_next(victim, when)
            return Result("told at the next step")
        victim.check_after(when)
    if raised is None:
        return Result("not reached" if not counter.where else "swallowed")
    return Result("whole" if victim.opt.step_count == steps + 2 else "restored")


def _told_at_the_next(victim: Victim, when: str) -> None:
    """The second exception came before anybody could begin to restore: no step is taken from there."""
    moved = bits_of(victim.model)
    try:
        victim.step()
    except RuntimeError as error:
        expect("expected those of a whole step" in str(error), f"left moved: {when}: then {error}")
    else:
        expect(False, f"left moved: {when}, and nobody was told")
    expect(bits_of(victim.model) == moved, f"left moved: {when}: and moved once more")


def _leaves(victim: Victim, counter: Counter, failing: bool) -> BaseException | None:
    """What leaves the step."""
    error: Any = None
    with counting(counter):
        try:
            _disturbed(victim, failing)
        except BaseException as raised:
            error = raised
    if error is not None and not isinstance(error, Asynchronous):
        cause: Any = error
        while cause is not None and not isinstance(cause, Asynchronous):
            cause = cause.__context__
        return error if cause is None else cause
    return error  # type: ignore[no-any-return]
