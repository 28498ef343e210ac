"""`svrg-variance`: the variance of MeZO-SVRG's estimate beside MeZO's at the same weights, and where it comes from."""

from __future__ import annotations

import importlib.util
import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...bench.registry import Case, Row
from ..interval import ratio, spread
from . import estimates, theory
from .estimates import Measured
from .methods import Method
from .problems import BATCH, Problem, digits, flat, least_squares
from .runs import Stepper
from .theory import Split

_THREADS = 1
_DRAWS = 40
_AGES = {2: 1, 5: 4, 10: 9}  # q -> steps from the anchor to the last step of its period
_MOST_ERRORS = 5.0
_MOST_OFF = 0.02  # of the whole variance: theory is for ε -> 0, and ε z reaches over kinks that gradients jump at


@dataclass(frozen=True)
class Place:
    """Where variances are measured.

    Args:
        walked: steps of MeZO-SVRG (q = 2) from the start of a run to the anchor.
        rate: both learning rates, on the walk and from the anchor on.
    """

    name: str
    make: Callable[[str], Problem]
    walked: int
    rate: float
    needs: str | None = None


_PLACES = (
    Place("least-squares/start", least_squares, 0, 2**-10),
    Place("least-squares/late", least_squares, 300, 2**-10),
    Place("near-optimum/start", partial(least_squares, label_noise=1.0, near=True), 0, 2**-10),
    Place("mlp/start", digits, 0, 2**-7, "sklearn"),
    Place("mlp/late", digits, 200, 2**-7, "sklearn"),
)


def cases(options: Namespace) -> Iterator[Case]:
    for place in _PLACES:
        facts = {"claim": "svrg-variance", "device": options.device or "cpu", "dtype": "float32", "threads": _THREADS}
        facts |= {"place": place.name, "batch": BATCH}
        skipped = None
        if place.needs is not None and importlib.util.find_spec(place.needs) is None:
            skipped = "scikit-learn is not installed"
        yield Case(f"svrg-variance/{place.name}", facts, partial(_measure, options, place), skipped)


def _measure(options: Namespace, place: Place) -> list[Row]:
    torch.set_num_threads(_THREADS)
    problem = place.make(options.device or "cpu")
    draws, walked = (8, min(place.walked, 4)) if options.fast else (_DRAWS, place.walked)
    anchors = {seed: _walk(problem, seed, walked, place.rate) for seed in options.seeds}
    alone = {seed: estimates.mezo(problem, anchor, seed, draws) for seed, anchor in anchors.items()}
    rows = []
    for q, age in _AGES.items():
        for directions in ("shared", "separate"):
            found = []
            for seed, anchor in anchors.items():
                correction = estimates.correction(problem, anchor, age, directions, place.rate, seed, draws)
                mezo = estimates.mezo(problem, correction.theta, seed, draws)
                found.append(Seed(seed, correction, mezo, alone[seed], anchor, directions))
            known = {"anchor_every": q, "age": age, "directions": directions, "draws": draws, "walked": walked}
            rows += _rows(known | {"elements": problem.dimension, "examples": problem.examples}, found)
    return rows


def _walk(problem: Problem, seed: int, steps: int, rate: float) -> Tensor:
    stepper = Stepper(problem, Method("walk", 2), seed, rate, rate)
    stepper.steps(steps)
    return flat(stepper.model)


@dataclass(frozen=True)
class Seed:
    """What was measured with one seed: the correction and MeZO at θ, and MeZO at the anchor."""

    seed: int
    correction: Measured
    mezo: Measured
    at_anchor: Measured
    anchor: Tensor
    directions: str

    def row(self) -> Row:
        """Variances in units of |∇f(θ)|²; the estimate's own and what theory expects of it."""
        unit = self.mezo.here.mean(0).square().sum().item()
        svrg = Split(self.correction.split.direction, self.correction.split.minibatch, self.at_anchor.split.direction)
        expected = theory.svrg(self.correction.here, self.at_anchor.here, self.directions)
        mezo, mezo_expected = self.mezo.split, theory.mezo(self.mezo.here)
        return {
            "run_seed": self.seed,
            "distance": (self.correction.theta - self.anchor).norm().item(),
            "noise_to_signal": theory.covariance(self.mezo.here, self.mezo.here) / unit,
            "mezo_direction": mezo.direction / unit,
            "mezo_minibatch": mezo.minibatch / unit,
            "mezo_variance": mezo.total / unit,
            "mezo_expected": mezo_expected.total / unit,
            "direction": svrg.direction / unit,
            "minibatch": svrg.minibatch / unit,
            "anchor": svrg.anchor / unit,
            "variance": svrg.total / unit,
            "expected": expected.total / unit,
            "expected_ratio": expected.total / mezo_expected.total,
            "full_batch_worth": theory.worth(self.mezo.here),
        }

    def checks(self) -> dict[str, tuple[float, float]]:
        """Each part's distance from what theory expects, and its standard error, as shares of the whole variance."""
        expected = theory.svrg(self.correction.here, self.at_anchor.here, self.directions)
        mezo = theory.mezo(self.mezo.here)
        return {
            "mezo_direction": _off(self.mezo, "direction", mezo.direction, mezo),
            "mezo_minibatch": _off(self.mezo, "minibatch", mezo.minibatch, mezo),
            "direction": _off(self.correction, "direction", expected.direction, expected),
            "minibatch": _off(self.correction, "minibatch", expected.minibatch, expected),
            "anchor": _off(self.at_anchor, "direction", expected.anchor, expected),
        }


def _off(measured: Measured, part: str, expected: float, whole: Split) -> tuple[float, float]:
    return (getattr(measured.split, part) - expected) / whole.total, getattr(measured.errors, part) / whole.total


def _rows(known: Row, found: list[Seed]) -> list[Row]:
    rows = [seed.row() for seed in found]
    worst = 0.0
    for part in found[0].checks():
        off, errors = zip(*(seed.checks()[part] for seed in found), strict=True)
        mean_off, error = abs(statistics.fmean(off)), math.hypot(*errors) / len(off)
        worst = max(worst, mean_off)
        if not mean_off <= max(_MOST_ERRORS * error, _MOST_OFF):
            off_by = f"{known['directions']}, q={known['anchor_every']}: {part} is {mean_off:.0%} of the variance off"
            return [{**known, "correct": False, "wrong": f"{off_by}, {mean_off / error:.1f} standard errors"}]
    known = {**known, "correct": True}
    mean: Row = {**known, "run_seed": None, "runs": len(rows), "off_theory": worst}
    for key in rows[0]:
        if key != "run_seed":
            mean = spread(mean, [row[key] for row in rows], key)
    period, cost = known["anchor_every"], theory.cost(known["examples"], known["anchor_every"])
    mean |= {"period_steps": period, "period_cost": cost}
    mean |= {"pays_in_steps": mean["full_batch_worth"] > period, "pays_in_queries": mean["full_batch_worth"] > cost}
    mean |= ratio([row["variance"] for row in rows], [row["mezo_variance"] for row in rows], "to_mezo")
    return [*({**known, **row} for row in rows), mean]


def cells(row: Row) -> dict[str, str]:
    low = row.get("to_mezo_ratio_low")
    interval = "" if low is None else f" ({low:.3g} to {row['to_mezo_ratio_high']:.3g}) {row['to_mezo_verdict']}"
    return {
        "q": str(row["anchor_every"]),
        "directions": row["directions"],
        "seed": str(row["run_seed"]) if row["run_seed"] is not None else f"mean of {row['runs']}",
        "|θ - θ̄|": f"{row['distance']:.2g}",
        "full batch's worth": f"{row['full_batch_worth']:.3g}",
        "MeZO: direction + minibatch": f"{row['mezo_direction']:.3g} + {row['mezo_minibatch']:.3g}",
        "SVRG: direction + minibatch + anchor": " + ".join(
            f"{row[part]:.3g}" for part in ("direction", "minibatch", "anchor")
        ),
        "÷ MeZO's": "" if row.get("to_mezo_ratio") is None else f"{row['to_mezo_ratio']:.3g}{interval}",
        "expected": f"{row['expected_ratio']:.3g}",
        "period's cost": f"{row['period_cost']:.3g}" if "period_cost" in row else "",
    }
