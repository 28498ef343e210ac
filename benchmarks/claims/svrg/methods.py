"""The methods that are compared, at work on a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

import zo_kernels as zo

from ...step.exact import wrong_step
from .problems import BATCH, Problem

EPS = 1e-3
_CHECKED_LR = 1e-5
EVERY = slice(None)  # the whole training set, as an index


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: in the rows.
        anchor_every: q of MeZO-SVRG; 0 for MeZO.
        directions: of the two minibatch estimates of MeZO-SVRG: "shared", or "separate" as in the published code.
        full: every step takes the whole training set.
    """

    name: str
    anchor_every: int = 0
    directions: str = "shared"
    full: bool = False

    def queries(self, steps: int, problem: Problem) -> int:
        """Example-forwards of the first so many steps."""
        anchors = -(-steps // self.anchor_every) if self.anchor_every else 0
        batch = len(problem.x) if self.full else BATCH
        return 2 * len(problem.x) * anchors + (4 if anchors else 2) * batch * (steps - anchors)

    def steps_for(self, queries: int, problem: Problem) -> int:
        """How many steps a budget of example-forwards pays for, at least one."""
        steps = 1
        while self.queries(steps + 1, problem) <= queries:
            steps += 1
        return steps


MEZO = Method("mezo")
METHODS = (
    MEZO,
    Method("mezo-full-batch", full=True),
    *(Method(f"svrg-q{q}", q) for q in (2, 5, 10)),
    Method("svrg-q5-separate", 5, "separate"),
)


class Stepper:
    """An optimizer of the library at work on a problem, in place and in float32; it counts its example-forwards."""

    def __init__(self, problem: Problem, method: Method, seed: int, lr: float, anchor_lr: float | None = None):
        self.problem, self.full, self.queries = problem, method.full, 0
        self.model = problem.model(seed)
        make: Callable[..., Any] = zo.MeZO
        if method.anchor_every:
            own = {"anchor_lr": anchor_lr, "shared_direction": method.directions == "shared"}
            make = partial(zo.MeZOSVRG, anchor_every=method.anchor_every, **own)
        self.optimizer = make(self.model, lr=lr, eps=EPS, seed=seed, parallel="off")

    def steps(self, count: int) -> None:
        for _ in range(count):
            index = EVERY if self.full else self.problem.batch(self.optimizer.seed, self.optimizer.step_count)
            anchor = [self.closure(EVERY)] if isinstance(self.optimizer, zo.MeZOSVRG) else []
            self.optimizer.step(self.closure(index), *anchor)

    def closure(self, index: Tensor | slice) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            self.queries += len(self.problem.x) if index is EVERY else BATCH
            return self.problem.loss(self.model, index)

        return loss


def wrong(problem: Problem, method: Method) -> str | None:
    """Take a step of MeZO, or a period of MeZO-SVRG, and say where it leaves the formula."""
    stepper = Stepper(problem, method, 0, _CHECKED_LR, _CHECKED_LR)

    def run(closure: Callable[[], Tensor]) -> None:
        for _ in range(method.anchor_every or 1):
            stepper.optimizer.step(*[closure] * (2 if method.anchor_every else 1))

    index = EVERY if method.full else problem.batch(0, 0)
    return wrong_step(stepper.optimizer, stepper.model, stepper.closure(index), run)
