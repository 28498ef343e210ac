"""The methods that are compared: what each costs, and its formula for many runs at once.

The formulas choose learning rates, run what the library does not offer, and check what it does: given the same draws,
an optimizer must end where its formula does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zo_kernels.estimators.draws import ANCHOR_SLOT, SEPARATE_SLOT

from .draws import Draws
from .problems import BATCH, Problem, flat

EPS = 1e-3


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: of the rows.
        anchor_every: q of MeZO-SVRG; 0 for the others.
        directions: of the two minibatch estimates of MeZO-SVRG: "shared", "separate", or "aliased" as in the published
            code, which draws them apart, both at the current weights, since it copies references to the anchor.
        full: every step takes the whole training set.
        gradient: the true gradient by autograd in place of an estimate.
    """

    name: str
    anchor_every: int = 0
    directions: str = "shared"
    full: bool = False
    gradient: bool = False

    @property
    def ours(self) -> bool:
        """Whether the library has an optimizer for it."""
        return not self.gradient and self.directions != "aliased"

    def queries(self, step: int, problem: Problem) -> int:
        """Example-forwards of a step; a gradient counts as one forward, though its backward costs about two more."""
        per = 1 if self.gradient else 2
        if self.anchor_every:
            return 2 * problem.examples if step % self.anchor_every == 0 else 4 * BATCH
        return per * (problem.examples if self.full else BATCH)

    def steps_for(self, queries: int, problem: Problem) -> int:
        """How many steps a budget of example-forwards pays for, at least one."""
        steps = 0
        while (cost := self.queries(steps, problem)) <= queries:
            queries -= cost
            steps += 1
        return max(steps, 1)


MEZO = Method("mezo")
FULL = Method("mezo-full-batch", full=True)
METHODS = (
    MEZO,
    FULL,
    *(Method(f"svrg-q{q}", q) for q in (2, 5, 10)),
    Method("svrg-q5-separate", 5, "separate"),
    *(Method(f"published-q{q}", q, "aliased") for q in (2, 5)),
    Method("sgd", gradient=True),
    Method("gd", gradient=True, full=True),
)


class Formula:
    """A method's steps for each seed of the draws and each pair of rates.

    Args:
        rates: (pairs, 2): lr and, for MeZO-SVRG, anchor_lr.

    Attributes:
        theta: (seeds, pairs, dimension).
    """

    def __init__(self, method: Method, draws: Draws, rates: Tensor):
        self._method, self._draws, self._problem = method, draws, draws.problem
        where = self._problem.x.device
        self._dtype = self._problem.x.dtype
        self._lr, self._anchor_lr = rates.to(where, self._dtype).unsqueeze(-1).unbind(1)
        starts = [flat(self._problem.model(seed)).to(self._dtype) for seed in draws.seeds]
        self.theta = torch.stack(starts).unsqueeze(1).repeat(1, len(rates), 1)
        self._anchor, self._g = self.theta, torch.zeros_like(self.theta)
        self.step_count = 0

    def loss(self) -> Tensor:
        """On the whole training set, (seeds, pairs)."""
        return self._problem.losses(self.theta, self._problem.x, self._problem.y)

    def step(self) -> None:
        t, method = self.step_count, self._method
        if method.gradient:
            self.theta = self.theta - self._lr * self._gradient(None if method.full else t)
        elif not method.anchor_every:
            self.theta = self.theta - self._lr * self._estimate(self.theta, self._z(t), None if method.full else t)
        elif t % method.anchor_every == 0:
            self._anchor = self.theta
            self._g = self._estimate(self.theta, self._z(t, ANCHOR_SLOT), None)
            self.theta = self.theta - self._anchor_lr * self._g
        else:
            z = self._z(t)
            other = z if method.directions == "shared" else self._z(t, SEPARATE_SLOT)
            anchor = self.theta if method.directions == "aliased" else self._anchor
            correction = self._estimate(self.theta, z, t) - self._estimate(anchor, other, t)
            self.theta = self.theta - self._lr * (correction + self._g)
        self.step_count += 1

    def _z(self, step: int, slot: int = 0) -> Tensor:
        return self._draws.directions(step, slot).to(self._dtype).unsqueeze(1)

    def _data(self, step: int | None) -> tuple[Tensor, Tensor]:
        x, y = self._problem.x, self._problem.y
        if step is None:
            return x, y
        index = self._draws.batches(step)
        return x[index].unsqueeze(1), y[index].unsqueeze(1)

    def _estimate(self, theta: Tensor, z: Tensor, step: int | None) -> Tensor:
        """By central differences, on all examples if the step is None."""
        x, y = self._data(step)
        above, below = (self._problem.losses(theta + sign * EPS * z, x, y) for sign in (1, -1))
        return ((above - below) / (2 * EPS)).unsqueeze(-1) * z

    def _gradient(self, step: int | None) -> Tensor:
        with torch.enable_grad():
            theta = self.theta.detach().requires_grad_()
            (g,) = torch.autograd.grad(self._problem.losses(theta, *self._data(step)).sum(), theta)
        return g
