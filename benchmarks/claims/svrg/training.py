"""`svrg-least-squares`, `svrg-mlp`: methods on one problem at equal steps, example-forwards (queries), and time."""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from statistics import fmean

import torch

from ...bench.registry import Case, Row, Wrong
from ...bench.timing import Call, Plan, Timer, alternate, median
from ..intervals import over_seeds, ratio
from ..learning import POINTS, TUNING_SEEDS, noted
from .methods import METHODS, MEZO, Method, Stepper, wrong
from .problems import BATCH, Problem, digits, least_squares

_COSTLIEST = METHODS[4]  # q = 10: its steps set the budget of example-forwards
_TIMED_STEPS = 10
_THREADS = 1  # these models are too small for more
_EXPONENTS = range(-11, -6)  # of 2: the rates to begin with
_RATIOS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # lr / anchor_lr of MeZO-SVRG; 0 leaves the anchors' steps alone
_FIRST_RATIOS = 4
_MOST_ROUNDS = 12
NO_SKLEARN = "scikit-learn is not installed"


def cases(options: Namespace) -> Iterator[Case]:
    """One for each method. MeZO is run first, whichever is asked for: the others are measured by it."""
    where, skipped = options.device or "cpu", None if importlib.util.find_spec("sklearn") else NO_SKLEARN
    far, near = partial(least_squares, where), partial(least_squares, where, label_noise=1.0, near=True)
    for comparison, claim, problem, reason in (
        (Comparison(options, far, 300), "svrg-least-squares", "far", None),
        (Comparison(options, near, 300), "svrg-least-squares", "near-optimum", None),
        # With fewer seeds than four, rates that suit them let another one diverge.
        (Comparison(options, partial(digits, where), 200, range(1000, 1004)), "svrg-mlp", "digits", skipped),
    ):
        known = {"claim": claim, "problem": problem, "device": where, "dtype": "float32", "threads": _THREADS}
        for method in METHODS:
            facts = known | {"method": method.name, "anchor_every": method.anchor_every or None, "batch": BATCH}
            facts["directions"] = method.directions if method.anchor_every else None
            yield Case(f"{claim}/{problem}/{method.name}", facts, partial(comparison.rows, method), reason)


@dataclass(frozen=True)
class Trained:
    """Runs at the rates that suit a method best: columns about these, and the losses of each seed above the floor."""

    steps: int
    tuned: Row
    losses: list[list[float]]


class Comparison:
    """What has been run on a problem so far."""

    def __init__(
        self, options: Namespace, make: Callable[[], Problem], steps: int, tuning: Sequence[int] = TUNING_SEEDS
    ):
        self._options, self._make, self._tuning_seeds = options, make, tuning
        self._steps = 2 * POINTS if options.fast else options.steps or steps
        self._trained = cache(self._train)

    @cached_property
    def problem(self) -> Problem:
        return self._make()

    def rows(self, method: Method) -> list[Row]:
        torch.set_num_threads(_THREADS)
        return [row for budget in ("steps", "queries", "time") for row in self._rows(method, budget)]

    def _train(self, method: Method, steps: int) -> Trained:
        """Raises Wrong: a run leaves the formula, or better rates may lie beyond those that were tried."""
        tuned = tune(method, self.problem, self._tuning_seeds, steps)
        if off := wrong(self.problem, method):
            raise Wrong(f"{method.name}: {off}")
        if tuned["at_edge"]:
            rates = f"{tuned['lr']:g} and {tuned['anchor_lr']}"
            raise Wrong(f"the best rates of {method.name}, {rates}, are at the edge of their grid")
        rates = tuned["lr"], tuned["anchor_lr"]
        return Trained(steps, tuned, [run(self.problem, method, s, *rates, steps) for s in self._options.seeds])

    def _with(self, method: Method, budget: str) -> tuple[Trained, int]:
        """The runs with a budget, and which of the noted losses is the last one in it."""
        if budget == "queries":
            given = _COSTLIEST.queries(self._steps, self.problem)
            return self._trained(method, method.steps_for(given, self.problem)), POINTS - 1
        trained = self._trained(method, self._steps)
        if budget == "steps":
            return trained, POINTS - 1
        steps = self._steps * min(self._times.values()) / self._times[method]
        return trained, max(i for i, at in enumerate(noted(self._steps)) if at <= steps or i == 0)

    def _rows(self, method: Method, budget: str) -> list[Row]:
        (trained, last), problem = self._with(method, budget), self.problem
        points = noted(trained.steps)
        known: Row = {"examples": len(problem.x), "elements": problem.dimension, "floor": problem.floor}
        known |= {"budget": budget, "correct": True, **trained.tuned}
        known |= {"steps": points[last], "queries": method.queries(points[last], problem)}
        if budget == "time":
            known["time_ratio"] = self._times[method]
        for i, step in enumerate(points if budget != "time" else (), 1):
            known |= {f"steps_{i}": step, f"queries_{i}": method.queries(step, problem)}
        found = [
            {"loss": each[last]} | ({f"loss_{i}": x for i, x in enumerate(each, 1)} if budget != "time" else {})
            for each in trained.losses
        ]
        rows = over_seeds(known, self._options.seeds, found)
        if method != MEZO:
            dense, at = self._with(MEZO, budget)
            rows[-1] |= ratio([each["loss"] for each in found], [each[at] for each in dense.losses], "to_mezo")
            if not method.anchor_every:
                rows[-1]["to_mezo_verdict"] = None  # the claim is about MeZO-SVRG
        return rows

    @cached_property
    def _times(self) -> dict[Method, float]:
        """The time of a step of each method in parts of MeZO's, taken in alternating pairs."""

        def call(method: Method) -> Call:
            stepper = Stepper(self.problem, method, 0, 1e-5, 1e-5)
            return Call(partial(stepper.steps, _TIMED_STEPS), _THREADS, steps=_TIMED_STEPS)

        others = {method.name: call(method) for method in METHODS if method != MEZO}
        plan, timer = Plan(2 if self._options.fast else 15, 0.0), Timer(torch.device(self._options.device or "cpu"))
        pairs = alternate(call(MEZO), others, timer, plan)
        ratios = {name: median([b.seconds / a.seconds for a, b in found]) for name, found in pairs.items()}
        return {method: ratios.get(method.name, 1.0) for method in METHODS}


def run(problem: Problem, method: Method, seed: int, lr: float, anchor_lr: float | None, steps: int) -> list[float]:
    """The losses at the noted steps, above the floor; inf from where the run diverged.

    Raises:
        Wrong: the run has asked for other losses than the method takes.
    """
    stepper, losses, points = Stepper(problem, method, seed, lr, anchor_lr), list[float](), noted(steps)
    try:
        for step in range(1, steps + 1):
            stepper.steps(1)
            losses += [problem.excess(stepper.model)] * points.count(step)
    except ValueError:  # a loss that is not finite
        return losses + [math.inf] * (POINTS - len(losses))
    if stepper.queries != (wanted := method.queries(steps, problem)):
        raise Wrong(f"{method.name}, seed {seed}: {stepper.queries} example-forwards, not {wanted}")
    return losses


def tune(method: Method, problem: Problem, seeds: Sequence[int], steps: int) -> Row:
    """The rates with which the training loss is lowest after so many steps, on other seeds than those that are shown.

    The grid, in steps of 2, grows until they are inside.

    Returns:
        The columns `lr` and `anchor_lr`; `rates_tried`; `at_edge`, whether larger or smaller ones were not tried (a
        ratio of 0 is no edge); `tuning_loss`, and `tuning_loss_of_anchors_alone`, the best with lr = 0.
    """

    def losses(points: list[tuple[int, float]]) -> dict[tuple[int, float], float]:
        ends = {(k, r): [run(problem, method, s, r * 2.0**k, 2.0**k, steps)[-1] for s in seeds] for k, r in points}
        return {point: fmean(found) for point, found in ends.items()}

    svrg = bool(method.anchor_every)
    exponents, ratios = list(_EXPONENTS), list(_RATIOS[:_FIRST_RATIOS] if svrg else (1.0,))
    found = losses([(k, r) for k in exponents for r in ratios])
    for _ in range(_MOST_ROUNDS):
        k, r = min(found, key=lambda point: found[point])
        new: list[tuple[int, float]] = []
        if k in (exponents[0], exponents[-1]):
            further = k - 1 if k == exponents[0] else k + 1
            exponents = sorted([*exponents, further])
            new += [(further, ratio) for ratio in ratios]
        if svrg and r == ratios[-1] and len(ratios) < len(_RATIOS):
            ratios.append(_RATIOS[len(ratios)])
            new += [(exponent, ratios[-1]) for exponent in exponents]
        if not new:
            break
        found |= losses(new)
    k, r = min(found, key=lambda point: found[point])
    alone = min((loss for (_, r), loss in found.items() if r == 0.0), default=None)
    return {
        "lr": r * 2.0**k,
        "anchor_lr": 2.0**k if svrg else None,
        "rates_tried": len(found),
        "at_edge": k in (exponents[0], exponents[-1]) or (svrg and r == ratios[-1]),
        "tuning_loss": found[k, r],
        "tuning_loss_of_anchors_alone": alone,
    }
