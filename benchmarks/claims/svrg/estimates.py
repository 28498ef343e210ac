"""The variance of the estimates that the optimizers make, at weights that stay where they are (a learning rate of 0).

Two optimizers with one seed draw the same directions. One is given minibatches, the other the whole training set in
their place: what the second one has is the direction's part of the variance, what differs is the minibatch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_kernels.estimators.draws import SEPARATE_SLOT
from zo_kernels.trajectory.record import projected_gradients

from .draws import Draws
from .methods import EPS, FULL, MEZO, Method
from .problems import Problem, flat, put
from .runs import Stepper
from .theory import Split

_NEVER = 2**30


@dataclass(frozen=True)
class Measured:
    """A variance, and where it was measured.

    Args:
        split: without the anchor's part.
        errors: the standard errors of its parts.
        theta: the weights, (dimension,).
        here: the gradient of each example there, float64 (n, dimension).
    """

    split: Split
    errors: Split
    theta: Tensor
    here: Tensor


def mezo(problem: Problem, theta: Tensor, seed: int, draws: int) -> Measured:
    """Of MeZO's estimate at θ."""
    pair = [Stepper(problem, method, seed, 0.0, None) for method in (MEZO, FULL)]
    for stepper in pair:
        put(stepper.model, theta)
    here = problem.example_gradients(pair[0].model)
    return _measured(pair, here, here.mean(0), draws)


def correction(
    problem: Problem, anchor: Tensor, age: int, directions: str, rate: float, seed: int, draws: int
) -> Measured:
    """Of what MeZO-SVRG adds to the anchor's estimate, so many steps after the anchor's."""
    method = Method("svrg", _NEVER, directions)
    pair = [Stepper(problem, method, seed, rate, rate) for _ in range(2)]
    for stepper in pair:
        put(stepper.model, anchor)
    there = problem.example_gradients(pair[0].model)
    for stepper in pair:
        stepper.steps(1 + age)
        for group in stepper.optimizer.param_groups:
            group["lr"] = 0.0
    pair[1].full = True
    here = problem.example_gradients(pair[0].model)
    return _measured(pair, here, here.mean(0) - there.mean(0), draws, directions == "shared")


def _measured(pair: Sequence[Stepper], here: Tensor, mean: Tensor, draws: int, shared: bool = True) -> Measured:
    estimates = zip(*(_estimates(stepper, draws, shared) for stepper in pair), strict=True)
    parts = [(((full - mean) ** 2).sum(), ((batch - full) ** 2).sum()) for batch, full in estimates]
    squares = torch.tensor(parts, dtype=torch.float64)
    split, errors = squares.mean(0), squares.std(0) / draws**0.5
    return Measured(Split(*split.tolist()), Split(*errors.tolist()), flat(pair[0].model), here)


def _estimates(stepper: Stepper, draws: int, shared: bool) -> Iterator[Tensor]:
    """What so many steps estimate, float64 (dimension,) each; the weights stay."""
    optimizer = stepper.optimizer
    source = Draws(stepper.problem, ())
    for _ in range(draws):
        step = optimizer.step_count
        stepper.step()
        record = optimizer.trajectory[-1]
        z = source.direction(optimizer.seed, step).double()
        (g,) = record.projected_gradients
        estimate = g * z
        if record.anchor_losses:
            (g,) = projected_gradients(record.anchor_losses, EPS)
            other = z if shared else source.direction(optimizer.seed, step, SEPARATE_SLOT).double()
            estimate = estimate - g * other
        yield estimate
