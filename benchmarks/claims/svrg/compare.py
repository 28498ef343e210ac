"""Rows of all methods on one problem: at equal steps, at equal example-forwards, and at equal time."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from ...bench.registry import Case, Row
from ...bench.timing import Call, Plan, Timer, alternate, quantile
from ..interval import ratio, spread
from .draws import Draws
from .methods import FULL, METHODS, MEZO, Method
from .problems import BATCH, Problem
from .runs import CURVE, Run, Stepper, noted, runs
from .tuning import TUNING_SEEDS, Tuned, tune

_COSTLIEST = METHODS[4]  # q = 10: its steps set the budget of example-forwards
_TIMED_STEPS = 10
_PUBLISHED = "steps, published rates"
_THREADS = 1  # these models are too small for more


def cases(
    options: Namespace,
    claim: str,
    problem: str,
    make: Callable[[], Problem],
    steps: int,
    published: Mapping[str, tuple[float, float | None]] | None = None,
    tuning_seeds: Sequence[int] = TUNING_SEEDS,
) -> Iterator[Case]:
    """One for each method. MeZO is run first, whichever is asked for: the others are measured by it.

    Args:
        published: learning rates, and anchors', of the published script for some methods, to be run too.
        tuning_seeds: those that learning rates are chosen on.
    """
    comparison = Comparison(options, make, steps, published or {}, tuning_seeds)
    for method in METHODS:
        facts = {
            "claim": claim,
            "problem": problem,
            "device": options.device or "cpu",
            "dtype": "float32",
            "threads": _THREADS,
            "method": method.name,
            "anchor_every": method.anchor_every or None,
            "directions": method.directions if method.anchor_every else None,
            "library": method.ours,
            "batch": BATCH,
        }
        yield Case(f"{claim}/{problem}/{method.name}", facts, partial(comparison.rows, method))


@dataclass(frozen=True)
class Trained:
    """The runs of a method with a budget, one for each seed."""

    steps: int
    tuned: Tuned
    runs: list[Run]

    @property
    def last(self) -> list[float]:
        return [run.losses[-1] for run in self.runs]


class Comparison:
    """What has been run on a problem so far."""

    def __init__(
        self,
        options: Namespace,
        make: Callable[[], Problem],
        steps: int,
        published: Mapping[str, tuple[float, float | None]],
        tuning_seeds: Sequence[int],
    ):
        self._tuning_seeds = tuple(tuning_seeds)
        self._options, self._make, self._published = options, make, published
        self._steps = 2 * CURVE if options.fast else options.steps or steps
        self._trained: dict[tuple[Method, int, bool], Trained] = {}
        self._ratios: dict[Method, float] = {}

    @cached_property
    def problem(self) -> Problem:
        return self._make()

    @cached_property
    def _draws(self) -> tuple[Draws, Draws]:
        return Draws(self.problem, self._tuning_seeds), Draws(self.problem, tuple(self._options.seeds))

    @cached_property
    def _budget(self) -> int:
        return sum(_COSTLIEST.queries(step, self.problem) for step in range(self._steps))

    def rows(self, method: Method) -> list[Row]:
        torch.set_num_threads(_THREADS)
        problem = self.problem
        shared = {"examples": problem.examples, "elements": problem.dimension, "floor": problem.floor}
        rows = []
        for budget in ("steps", "queries", "time"):
            if budget == "time" and not method.ours:
                continue  # a formula for many runs at once takes no time of its own
            rows += [{**shared, "budget": budget, **row} for row in self._rows(method, budget)]
        if method.name in self._published:
            rows += [{**shared, "budget": _PUBLISHED, **row} for row in self._rows(method, _PUBLISHED)]
        return rows

    def train(self, method: Method, budget: str) -> Trained:
        """At the rates that suit the method best with that budget; equal time is read off the runs of equal steps."""
        steps = method.steps_for(self._budget, self.problem) if budget == "queries" else self._steps
        given = self._published[method.name] if budget == _PUBLISHED else None
        key = method, steps, given is None
        if key not in self._trained:
            tuning, shown = self._draws
            tuned = tune(method, tuning, steps) if given is None else Tuned(*given)
            self._trained[key] = Trained(steps, tuned, runs(self.problem, method, tuned, shown, steps))
        return self._trained[key]

    def _rows(self, method: Method, budget: str) -> list[Row]:
        trained = self.train(method, budget)
        wrong = next((run.wrong for run in trained.runs if run.wrong), None)
        if wrong is None and trained.tuned.at_edge:
            wrong = f"the best rates, {trained.tuned.lr:g} and {trained.tuned.anchor_lr}, are at the edge of their grid"
        if wrong is not None:
            return [{"correct": False, "wrong": wrong}]
        tuned = trained.tuned
        known: Row = {
            "correct": True,
            "lr": tuned.lr,
            "anchor_lr": tuned.anchor_lr,
            "rates_tried": tuned.tried,
            "at_edge": tuned.at_edge,
            "tuning_loss": _finite(tuned.loss),
            "tuning_loss_of_anchors_alone": _finite(tuned.loss_of_anchors_alone),
            "steps": trained.steps,
            "queries": trained.runs[0].queries,
        }
        if budget == "time":
            at = self._at_equal_time(method)
            known |= {"time_ratio": self._ratios[method], "steps": noted(trained.steps)[at]}
            known["queries"] = sum(method.queries(step, self.problem) for step in range(known["steps"]))
        losses = self._losses(method, budget)
        seeds = self._options.seeds
        rows: list[Row] = [known | {"run_seed": s, "loss": _finite(x)} for s, x in zip(seeds, losses, strict=True)]
        mean = spread({**known, "run_seed": None, "runs": len(losses)}, losses, "loss")
        for baseline in (MEZO, FULL):
            if method != baseline and (budget != _PUBLISHED or baseline.name in self._published):
                mean |= ratio(losses, self._losses(baseline, budget), _to(baseline))
                if not method.anchor_every:
                    mean[f"{_to(baseline)}_verdict"] = None  # the claim is about MeZO-SVRG
        if budget != "time":
            for i, (at, each) in enumerate(
                zip(noted(trained.steps), zip(*(run.losses for run in trained.runs), strict=True), strict=True), 1
            ):
                mean[f"steps_{i}"] = at
                mean[f"queries_{i}"] = sum(method.queries(step, self.problem) for step in range(at))
                mean = spread(mean, each, f"loss_{i}")
        return [*rows, mean]

    def _losses(self, method: Method, budget: str) -> list[float]:
        trained = self.train(method, budget)
        if budget != "time":
            return trained.last
        at = self._at_equal_time(method)
        return [run.losses[at] for run in trained.runs]

    def _at_equal_time(self, method: Method) -> int:
        """Which of the noted losses is the last one in the time that the fastest method's steps take."""
        self._measure()
        steps = self._steps * min(self._ratios.values()) / self._ratios[method]
        return max(i for i, at in enumerate(noted(self._steps)) if at <= steps or i == 0)

    def _measure(self) -> None:
        """Time a step of each optimizer against MeZO's, in alternating pairs."""
        if self._ratios:
            return

        def call(method: Method) -> Call:
            stepper = Stepper(self.problem, method, 0, 1e-5, 1e-5)
            return Call(partial(stepper.steps, _TIMED_STEPS), _THREADS, steps=_TIMED_STEPS)

        others = {method.name: call(method) for method in METHODS if method.ours and method != MEZO}
        plan = Plan(2, 0.0) if self._options.fast else Plan(15, 0.0)
        pairs = alternate(call(MEZO), others, Timer(torch.device(self._options.device or "cpu")), plan)
        self._ratios[MEZO] = 1.0
        for method in METHODS:
            if method.name in pairs:
                self._ratios[method] = quantile([b.seconds / a.seconds for a, b in pairs[method.name]], 0.5)


def _to(baseline: Method) -> str:
    return f"to_{baseline.name.replace('-', '_')}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def cells(row: Row) -> dict[str, str]:
    rates = f"{row['lr']:.1e}" + ("" if row["anchor_lr"] is None else f", {row['anchor_lr']:.1e}")
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.3g}"
    return {
        "at equal": row["budget"],
        "steps": f"{row['steps']:,}",
        "queries": f"{row['queries']:,}",
        "lr, anchor's": rates,
        "seed": str(row["run_seed"]) if row["run_seed"] is not None else f"mean of {row['runs']}",
        "loss": loss + (f" ± {row['loss_sd']:.2g}" if row.get("loss_sd") is not None else ""),
        "÷ MeZO's": _ratio(row, "to_mezo"),
        "÷ full batch's": _ratio(row, "to_mezo_full_batch"),
    }


def _ratio(row: Row, name: str) -> str:
    if row.get(f"{name}_ratio_low") is None:
        return ""
    low, high = row[f"{name}_ratio_low"], row[f"{name}_ratio_high"]
    return f"{row[f'{name}_ratio']:.3g} ({low:.3g} to {high:.3g}) {row[f'{name}_verdict'] or ''}"
