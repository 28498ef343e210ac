"""Training runs of several methods on one task: rates are chosen on other seeds, then each seed has a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..bench.registry import Row, Wrong
from .intervals import difference, over_seeds, ratio

POINTS = 10  # of a curve, evenly in steps
TUNING_SEEDS = (1000, 1001)
_MOST_TRIED = 12
_HOPELESS = 1.0  # nats above the start


class Task(Protocol):
    """A model at its start, minibatches, and what is measured."""

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module: ...

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        """The loss of one minibatch after another, for ever."""

    def dev_loss(self, model: nn.Module, seed: int) -> float: ...

    def test(self, model: nn.Module, seed: int) -> Row:
        """`test_loss`, and `test_accuracy` where a task has one."""


@dataclass(frozen=True)
class Arm:
    """One of the methods that are compared.

    Args:
        name: in the rows.
        make: the optimizer, from a model, a learning rate and a seed.
        wrong: takes a step of the optimizer, and says what is wrong with it, or None.
        dtype: of the weights.
        facts: columns of its rows.
        forwards: of a step.
        guess: the learning rate to begin with, in parts of the study's.
    """

    name: str
    make: Callable[[nn.Module, float, int], Any]
    wrong: Callable[[Any, nn.Module, Callable[[], Tensor]], str | None]
    dtype: torch.dtype = torch.float32
    facts: Row = field(default_factory=dict)
    forwards: int = 2
    guess: float = 1.0


@dataclass(frozen=True)
class Curve:
    """The dev losses of a run, inf from where it diverged, after `steps` of it; and the test at its end, if any."""

    steps: Sequence[int]
    losses: Sequence[float]
    test: Row = field(default_factory=dict)

    def at(self, step: float) -> float:
        """The dev loss there, interpolated."""
        return float(np.interp(step, self.steps, self.losses))

    def reaches(self, loss: float) -> float:
        """The first step, interpolated, at which the dev loss is as low as that; inf if it never is."""
        for (a, before), (b, after) in pairwise(zip(self.steps, self.losses, strict=True)):
            if after <= loss:
                return a + (b - a) * ((before - loss) / (before - after) if before > loss else 0.0)
        return math.inf


@dataclass(frozen=True)
class Result:
    """The rate chosen for an arm, of those tried (rate -> dev loss at the end), and a curve with it for each seed."""

    arm: Arm
    lr: float
    tried: dict[float, float]
    curves: list[Curve]

    @property
    def columns(self) -> Row:
        start = self.curves[0].losses[0]
        return {
            "correct": True,
            "arm": self.arm.name,
            **self.arm.facts,
            "lr": self.lr,
            "lr_at_edge": self.lr in (min(self.tried), max(self.tried)),
            "lrs_tried": len(self.tried),
            "highest_useful_lr": max((lr for lr, loss in self.tried.items() if loss < start), default=None),
            "steps": self.curves[0].steps[-1],
        }


@dataclass
class Study:
    """Arms on one task, each run when it is first asked for.

    Args:
        make: the task, when it is needed.
        steps: of each run.
        seeds: of the runs that count.
        guess: the learning rate to begin with.
        threads: for PyTorch.
        skipped: why the task cannot run here, or None.
    """

    make: Callable[[], Task]
    steps: int
    seeds: Sequence[int]
    guess: float
    threads: int = 1
    skipped: str | None = None
    _results: dict[str, Result] = field(default_factory=dict, init=False)

    @cached_property
    def task(self) -> Task:
        return self.make()

    def result(self, arm: Arm) -> Result:
        """Check the arm, choose its rate, run it.

        Raises:
            Wrong: and nothing was run with that arm.
        """
        if arm.name not in self._results:
            torch.set_num_threads(self.threads)
            self.check(arm)
            lr, tried = self.grid(arm)
            curves = [self.run(arm, lr, seed) for seed in self.seeds]
            self._results[arm.name] = Result(arm, lr, tried, curves)
        return self._results[arm.name]

    def grid(self, arm: Arm) -> tuple[float, dict[float, float]]:
        """The rate of an arm, and those tried."""
        return choose(lambda lr: self.tuning_loss(arm, lr), arm.guess * self.guess)

    def run(self, arm: Arm, lr: float, seed: int) -> Curve:
        return run(self.task, arm, lr, seed, self.steps)

    @torch.no_grad()
    def check(self, arm: Arm) -> None:
        """Raise Wrong if a step of the arm is not what it should be."""
        seed = self.seeds[0]
        model = self.task.model(seed, arm.dtype)
        if wrong := arm.wrong(
            arm.make(model, arm.guess * self.guess, seed), model, next(self.task.closures(model, seed))
        ):
            raise Wrong(f"{arm.name}: {wrong}")

    def tuning_loss(self, arm: Arm, lr: float) -> float:
        """The dev loss at the end, the mean of the tuning seeds; inf as soon as one of them diverges."""
        losses: list[float] = []
        for seed in TUNING_SEEDS:
            losses.append(self.run(arm, lr, seed).losses[-1])
            if math.isinf(losses[-1]):
                return math.inf
        return fmean(losses)

    def rows(self, arm: Arm, baseline: Arm) -> list[Row]:
        """The row of each run, then that of all, compared in pairs with the baseline's."""
        dense, result = self.result(baseline), self.result(arm)
        found = [
            {"start_loss": curve.losses[0], "dev_loss": curve.losses[-1], **curve.test}
            | {f"dev_loss_{i}": loss for i, loss in enumerate(curve.losses[1:], 1)}
            for curve in result.curves
        ]
        rows = over_seeds(result.columns, self.seeds, found)
        rows[-1] |= difference([c.losses[-1] for c in result.curves], [c.losses[-1] for c in dense.curves], "dev_loss")
        return rows


def choose(loss_of: Callable[[float], float], guess: float) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss on a grid in steps of 2, which grows until the best is inside; and the grid.

    Of several with the lowest loss the smallest is the best: where all have diverged, the next is to be smaller.
    """
    tried = {lr: loss_of(lr) for lr in (guess / 2, guess, 2 * guess)}
    while True:
        best = min(tried, key=lambda lr: (tried[lr], lr))
        further = best / 2 if best == min(tried) else 2 * best
        if further in tried or len(tried) == _MOST_TRIED:
            return best, dict(sorted(tried.items()))
        tried[further] = loss_of(further)


def noted(steps: int, power: int = 1) -> list[int]:
    """The steps after which the losses of a run are noted, the last one included: (i / POINTS)^power of them."""
    return [max(1, round(steps * (i / POINTS) ** power)) for i in range(1, POINTS + 1)]


@torch.no_grad()
def run(task: Task, arm: Arm, lr: float, seed: int, steps: int, power: int = 1) -> Curve:
    """One run from the start. It ends early where a loss is not finite or far above the start."""
    model = task.model(seed, arm.dtype)
    optimizer = arm.make(model, lr, seed)
    closures = task.closures(model, seed)
    points = sorted(set(noted(steps, power)))
    losses = [task.dev_loss(model, seed)]
    for step in range(1, steps + 1):
        try:
            optimizer.step(next(closures))
        except ValueError:  # a loss that is not finite
            break
        if step in points:
            loss = task.dev_loss(model, seed)
            if not loss < losses[0] + _HOPELESS:
                break
            losses.append(loss)
    missing = len(points) + 1 - len(losses)
    return Curve((0, *points), (*losses, *[math.inf] * missing), {} if missing else task.test(model, seed))


def by_time(curves: Sequence[Curve], dense: Sequence[Curve], shares: Mapping[str, float]) -> Row:
    """Compare a method with MeZO by time: curves over steps, and what a step takes.

    Args:
        curves: of the method, one for each seed.
        dense: MeZO's.
        shares: the time of a step of the method in parts of MeZO's, by whose steps they are.

    Returns: for each of `shares`, under its name WHOSE,
        `WHOSE_step_time_ratio`: the share.
        `WHOSE_time_to_loss_*`: the time in parts of MeZO's until both have reached the higher of the losses that they
        end with (a ratio below 1: faster).
        `WHOSE_equal_time_*`: the difference of their losses when the first of them is done with its steps (below 0:
        lower).
    """
    pairs, row = list(zip(curves, dense, strict=True)), {}
    for whose, share in shares.items():
        until = [min(own.steps[-1], mezo.steps[-1] / share) for own, mezo in pairs]  # in the method's own steps
        row |= {f"{whose}_step_time_ratio": share}
        row |= ratio(*to_loss(curves, dense, share), f"{whose}_time_to_loss")
        then = [own.at(steps) for own, steps in zip(curves, until, strict=True)]
        its = [mezo.at(steps * share) for mezo, steps in zip(dense, until, strict=True)]
        row |= difference(then, its, f"{whose}_equal_time")
    return row


def to_loss(curves: Sequence[Curve], dense: Sequence[Curve], share: float) -> tuple[list[float], list[float]]:
    """What each pair of runs costs until both have reached the higher of the two losses that they end with.

    Args:
        share: the cost of a step of `curves`, in parts of one of `dense`.

    Returns:
        Costs of `curves` and of `dense`, in steps of the latter.
    """
    pairs = [(own, mezo, max(own.losses[-1], mezo.losses[-1])) for own, mezo in zip(curves, dense, strict=True)]
    return [share * own.reaches(loss) for own, _, loss in pairs], [mezo.reaches(loss) for _, mezo, loss in pairs]
