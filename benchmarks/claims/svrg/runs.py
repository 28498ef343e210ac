"""Runs of the optimizers at the rates chosen for them, checked against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo

from .draws import Draws, batch
from .methods import EPS, Formula, Method
from .problems import Problem, flat
from .tuning import Tuned

CURVE = 10  # losses noted, evenly in steps
_CHECKED = 20  # steps after which optimizer and formula are compared; later, rounding decides where unstable runs go
_OFF = 0.05  # of the way from the start: float32 losses make float32 differences


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        losses: above the floor, after each tenth of the steps.
        queries: example-forwards, counted in the closures; of a formula, by its definition.
        wrong: what differs from the formula, or None.
    """

    losses: list[float]
    queries: int
    wrong: str | None = None


class Stepper:
    """An optimizer of the library, at work on a problem."""

    def __init__(self, problem: Problem, method: Method, seed: int, lr: float, anchor_lr: float | None):
        self.problem, self.queries = problem, 0
        self.model = problem.model(seed)
        self.full, self._seed = method.full, seed  # all examples in place of minibatches
        self.optimizer = optimizer(self.model, method, seed, lr, anchor_lr)
        self._step: Callable[..., Any] = self.optimizer.step

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        index = batch(self.problem, self._seed, self.optimizer.step_count)
        closures = [self.closure(None if self.full else index)]
        if isinstance(self.optimizer, zo.MeZOSVRG):
            closures.append(self.closure(None))
        self._step(*closures)

    def closure(self, index: Tensor | None) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            self.queries += self.problem.examples if index is None else len(index)
            return self.problem.loss(self.model, index)

        return loss


def optimizer(model: nn.Module, method: Method, seed: int, lr: float, anchor_lr: float | None) -> zo.ZeroOrderOptimizer:
    """The library's for a method, in place and in float32."""
    if not method.anchor_every:
        return zo.MeZO(model, lr=lr, eps=EPS, seed=seed, parallel="off")
    assert anchor_lr is not None
    return zo.MeZOSVRG(
        model,
        lr=lr,
        anchor_lr=anchor_lr,
        anchor_every=method.anchor_every,
        shared_direction=method.directions == "shared",
        eps=EPS,
        seed=seed,
        parallel="off",
    )


@torch.no_grad()
def runs(problem: Problem, method: Method, tuned: Tuned, draws: Draws, steps: int) -> list[Run]:
    """A run for each seed of the draws."""
    rates = torch.tensor([[tuned.lr, tuned.anchor_lr or 0.0]], dtype=torch.float64)
    formula = Formula(method, draws, rates)
    start, losses = formula.theta[:, 0].double(), []
    expected, checked, at = start, min(_CHECKED, steps), noted(steps)
    for i in range(1, steps + 1):
        formula.step()
        expected = formula.theta[:, 0].double() if i == checked else expected
        losses += [formula.loss()[:, 0].double() - problem.floor] * at.count(i)
    queries = sum(method.queries(step, problem) for step in range(steps))
    if not method.ours:
        return [Run(each, queries) for each in torch.stack(losses, 1).tolist()]
    found = []
    for row, seed in enumerate(draws.seeds):
        stepper, noted_losses, off = Stepper(problem, method, seed, tuned.lr, tuned.anchor_lr), list[float](), 0.0
        for i in range(1, steps + 1):
            stepper.step()
            noted_losses += [_excess(stepper)] * at.count(i)
            if i == checked:
                off = ((flat(stepper.model) - expected[row]).norm() / (expected[row] - start[row]).norm()).item()
        wrong = None
        if not off <= _OFF:
            wrong = f"seed {seed} is {off:.2%} of the way off the formula after {checked} steps"
        elif stepper.queries != queries:
            wrong = f"seed {seed} took {stepper.queries} example-forwards, not {queries}"
        found.append(Run(noted_losses, stepper.queries, wrong))
    return found


def noted(steps: int) -> list[int]:
    """The steps after which losses are noted: CURVE of them, the last one included."""
    return [max(1, round(steps * i / CURVE)) for i in range(1, CURVE + 1)]


def _excess(stepper: Stepper) -> float:
    """On the whole training set, in the precision of the formula."""
    problem = stepper.problem
    loss = problem.losses(flat(stepper.model).to(problem.x.dtype), problem.x, problem.y)
    return loss.item() - problem.floor
