"""Runs of several methods on one task: rates chosen for each on other seeds, then a curve for each seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

POINTS = 10  # of a curve, evenly in steps
_FIRST_TUNING_SEED = 1000
_MOST_TRIED = 12
_HOPELESS = 1.0  # nats above the start


class Task(Protocol):
    """What is learned: a model at its start, minibatches, and what is measured."""

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """At the start of the run with that seed."""

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """The loss of one minibatch after another, for ever."""

    def dev_loss(self, model: nn.Module) -> float: ...

    def test(self, model: nn.Module) -> dict[str, float]:
        """Columns of a row: `test_loss`, and `test_accuracy` where there is such."""


class Steps(Protocol):
    """An optimizer, or what steps like one."""

    def step(self, closure: Callable[[], Tensor]) -> object: ...


@dataclass(frozen=True)
class Arm:
    """One of the methods that are compared.

    Args:
        name: in the rows.
        make: the optimizer of a model, with a learning rate and a seed.
        wrong: takes a step of it and says what is wrong with that, or None.
        dtype: of the weights.
        facts: columns of its rows.
    """

    name: str
    make: Callable[[nn.Module, float, int], Steps]
    wrong: Callable[[Steps, nn.Module, Callable[[], Tensor]], str | None]
    dtype: torch.dtype = torch.float32
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Of one run.

    Args:
        steps: after which the dev loss was taken; 0 is the first.
        losses: the dev losses, inf from where the run diverged.
        test: columns of the test at the end, none where the run diverged.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    test: dict[str, float]

    def at(self, step: float) -> float:
        """The dev loss there, interpolated."""
        for i in range(1, len(self.steps)):
            if step <= self.steps[i]:
                part = (step - self.steps[i - 1]) / (self.steps[i] - self.steps[i - 1])
                return self.losses[i - 1] + part * (self.losses[i] - self.losses[i - 1])
        return self.losses[-1]

    def reaches(self, loss: float) -> float | None:
        """The first step, interpolated, at which the dev loss is as low as that; None if it never is."""
        for i in range(1, len(self.steps)):
            before, after = self.losses[i - 1 : i + 1]
            if after <= loss:
                part = (before - loss) / (before - after) if before > loss else 0.0
                return self.steps[i - 1] + part * (self.steps[i] - self.steps[i - 1])
        return None


@dataclass(frozen=True)
class Result:
    """Of an arm: the rate that was chosen, of which others, and the runs with it, one for each seed."""

    arm: Arm
    lr: float
    tried: dict[float, float]  # rate -> dev loss at the end, inf where it diverged
    curves: list[Curve]

    @property
    def at_edge(self) -> bool:
        """Whether no smaller or no larger rate was tried."""
        return self.lr in (min(self.tried), max(self.tried))

    @property
    def highest_useful_lr(self) -> float | None:
        """The highest rate tried whose run ended below its start."""
        start = self.curves[0].losses[0]
        return max((lr for lr, loss in self.tried.items() if loss < start), default=None)


class WrongStep(Exception):
    """An arm's step is not what it should be."""


class Study:
    """Arms on one task, each run when it is first asked for.

    Args:
        task: makes the task when it is needed.
        steps: of each run.
        seeds: of the runs that count.
        guess: the rate to begin with.
        tuning_seeds: how many other runs choose a rate.
    """

    def __init__(self, task: Callable[[], Task], steps: int, seeds: Sequence[int], guess: float, tuning_seeds: int = 1):
        self.steps, self.seeds, self.tuning_seeds = steps, list(seeds), tuning_seeds
        self._make, self._guess = task, guess
        self._results: dict[str, Result] = {}

    @cached_property
    def task(self) -> Task:
        return self._make()

    def result(self, arm: Arm) -> Result:
        """Check the arm, choose its rate, run it.

        Raises:
            WrongStep: and nothing was run with that arm.
        """
        if arm.name not in self._results:
            self._check(arm)
            lr, tried = _choose(lambda lr: self._tuning_loss(arm, lr), self._guess)
            curves = [run(self.task, arm, lr, seed, self.steps) for seed in self.seeds]
            self._results[arm.name] = Result(arm, lr, tried, curves)
        return self._results[arm.name]

    def _tuning_loss(self, arm: Arm, lr: float) -> float:
        """At the end, the mean of the tuning seeds; inf if one of them diverges, and then the rest is not run."""
        losses: list[float] = []
        for seed in range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + self.tuning_seeds):
            losses.append(run(self.task, arm, lr, seed, self.steps).losses[-1])
            if math.isinf(losses[-1]):
                return math.inf
        return sum(losses) / len(losses)

    def _check(self, arm: Arm) -> None:
        seed = self.seeds[0]
        model = self.task.model(seed, arm.dtype)
        with torch.no_grad():
            wrong = arm.wrong(arm.make(model, self._guess, seed), model, next(self.task.closures(model, seed)))
        if wrong:
            raise WrongStep(f"{arm.name}: {wrong}")


def _choose(loss_of: Callable[[float], float], guess: float) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss on a grid in steps of 2 that grows until the best is inside."""
    tried = {lr: loss_of(lr) for lr in (guess / 2, guess, 2 * guess)}
    while len(tried) < _MOST_TRIED:
        best = _best(tried)
        if best == min(tried):
            tried[best / 2] = loss_of(best / 2)
        elif best == max(tried):
            tried[2 * best] = loss_of(2 * best)
        else:
            break
    return _best(tried), dict(sorted(tried.items()))


def _best(tried: dict[float, float]) -> float:
    """The smallest rate of those with the lowest loss: where all have diverged, the next is to be smaller."""
    return min(tried, key=lambda lr: (tried[lr], lr))


@torch.no_grad()
def run(task: Task, arm: Arm, lr: float, seed: int, steps: int) -> Curve:
    """One run from the start; it ends early where it has become hopeless."""
    model = task.model(seed, arm.dtype)
    optimizer = arm.make(model, lr, seed)
    closures = task.closures(model, seed)
    noted = sorted({max(1, round(steps * i / POINTS)) for i in range(1, POINTS + 1)})
    losses = [task.dev_loss(model)]
    for step in range(1, steps + 1):
        try:
            optimizer.step(next(closures))
        except ValueError:  # a loss that is not finite
            break
        if step in noted:
            loss = task.dev_loss(model)
            if not loss < losses[0] + _HOPELESS:
                break
            losses.append(loss)
    diverged = len(losses) <= len(noted)
    losses += [math.inf] * (len(noted) + 1 - len(losses))
    return Curve((0, *noted), tuple(losses), {} if diverged else task.test(model))
