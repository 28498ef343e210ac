"""`svrg-variance`: the variance of MeZO-SVRG's estimate beside MeZO's at the same weights, and where it comes from.

The law of total variance says what to expect, from the gradients of the examples by autograd. With z ~ N(0, I_d),
E[z zᵀ] = I and E|z zᵀ a|² = (d + 2) |a|². Up to O(ε²) an estimate on a batch I is z zᵀ a_I, with a_I the batch's
gradient, a = E a_I, and S = E|a_I - a|². Split into what is left if the batch is full, and the rest,

    E|z zᵀ a_I - a|² = (d + 1) |a|²  [direction]  +  (d + 2) S  [minibatch]

MeZO has a_I = ∇f_I(θ). The correction of MeZO-SVRG with a shared z has a_I = ∇f_I(θ) - ∇f_I(θ̄), which is small near the
anchor θ̄; to it comes the anchor's own estimate, drawn once a period, with (d + 1) |∇f(θ̄)|². With separate z and z' the
correction is z zᵀ a_I - z' z'ᵀ b_I, b_I = ∇f_I(θ̄), and the two terms are independent given I:

    (d + 1) (|a|² + |b|²)  [direction]  +  (d + 2) (S_a + S_b) - 2 tr Cov(a_I, b_I)  [minibatch]

What a step is worth: with the best learning rate, SPSA lowers a loss of curvature L by |∇f|⁴ / (2 L E|estimate|²), and
E|estimate|² = (d + 2) (|∇f|² + S), so a step with the full batch is worth 1 + S / |∇f|² of MeZO's (`worth`). The
anchor's estimate has one z for the whole period, and the steps between anchors go along it again: near the anchor, a
period of MeZO-SVRG is one step with the full batch.
"""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from zo_kernels.estimators.draws import FIRST_SLOT, SEPARATE_SLOT
from zo_kernels.trajectory.record import projected_gradients

from ...bench.registry import Case, Row, Wrong
from ..intervals import over_seeds, ratio
from .methods import EPS, MEZO, Method, Stepper
from .problems import BATCH, Problem, digits, flat, least_squares, put
from .training import NO_SKLEARN

_THREADS = 1
_DRAWS = 40
_Q = 5  # steps from anchor to anchor; the last one of a period is looked at
_NEVER = 2**30
_MOST_ERRORS = 5.0
_MOST_OFF = 0.02  # of the whole variance: theory is for ε -> 0, and ε z reaches over kinks that gradients jump at


@dataclass(frozen=True)
class Place:
    """Where variances are measured.

    Args:
        make: the problem, on a device.
        walked: steps of MeZO-SVRG (q = 2) from the start of a run to the anchor.
        rate: both learning rates, on the walk and from the anchor on.
    """

    name: str
    make: Callable[[str], Problem]
    walked: int
    rate: float


_PLACES = (
    Place("least-squares/start", least_squares, 0, 2**-10),
    Place("least-squares/late", least_squares, 300, 2**-10),
    Place("near-optimum/start", partial(least_squares, label_noise=1.0, near=True), 0, 2**-10),
    Place("mlp/start", digits, 0, 2**-7),
    Place("mlp/late", digits, 200, 2**-7),
)


def cases(options: Namespace) -> Iterator[Case]:
    for place in _PLACES:
        facts = {"claim": "svrg-variance", "device": options.device or "cpu", "dtype": "float32", "threads": _THREADS}
        facts |= {"place": place.name, "batch": BATCH, "anchor_every": _Q, "age": _Q - 1}
        skipped = NO_SKLEARN if place.make is digits and importlib.util.find_spec("sklearn") is None else None
        yield Case(f"svrg-variance/{place.name}", facts, partial(_measure, options, place), skipped)


def covariance(a: Tensor, b: Tensor) -> float:
    """tr Cov of the means of a and b, (n, d), over a minibatch drawn without replacement."""
    n = len(a)
    return (n - BATCH) / (BATCH * (n - 1)) * ((a - a.mean(0)) * (b - b.mean(0))).sum(1).mean().item()


def square(gradients: Tensor) -> float:
    """|mean|²."""
    return gradients.mean(0).square().sum().item()


def mezo(here: Tensor) -> tuple[float, float]:
    """The variance of MeZO's estimate from direction and minibatch; `here` is each example's gradient at θ, (n, d)."""
    d = here.shape[1]
    return (d + 1) * square(here), (d + 2) * covariance(here, here)


def svrg(here: Tensor, there: Tensor, directions: str) -> tuple[float, float, float]:
    """The same of MeZO-SVRG's estimate, and from the anchor's; `there` are the gradients at the anchor, (n, d)."""
    (of_here, _), (of_there, _), d = mezo(here), mezo(there), here.shape[1]
    if directions == "shared":
        return *mezo(here - there), of_there
    minibatch = (d + 2) * (covariance(here, here) + covariance(there, there)) - 2 * covariance(here, there)
    return of_here + of_there, minibatch, of_there


def worth(here: Tensor) -> float:
    """How many steps of MeZO one with the full batch is worth."""
    return 1 + covariance(here, here) / square(here)


def _measure(options: Namespace, place: Place) -> list[Row]:
    torch.set_num_threads(_THREADS)
    problem = place.make(options.device or "cpu")
    draws, walked = (20, min(place.walked, 4)) if options.fast else (_DRAWS, place.walked)
    rows = []
    for directions in ("shared", "separate"):
        found = [_seed(problem, seed, walked, place.rate, draws, directions) for seed in options.seeds]
        known = {"directions": directions, "draws": draws, "walked": walked}
        rows += _rows(known | {"elements": problem.dimension, "examples": len(problem.x)}, options.seeds, found)
    return rows


def _seed(
    problem: Problem, seed: int, walked: int, rate: float, draws: int, directions: str
) -> tuple[Row, dict[str, tuple[float, float]]]:
    """The row of a seed, variances in units of |∇f(θ)|²; and what `_wrong` asks."""
    walk = Stepper(problem, Method("walk", 2), seed, rate, rate)
    walk.steps(walked)
    anchor = flat(walk.model)
    pair = _pair(problem, Method("svrg", _NEVER, directions), seed, anchor, rate)
    for stepper in pair:
        stepper.steps(_Q)  # the anchor's own step, and those up to the last one of the period
        for group in stepper.optimizer.param_groups:
            group["lr"] = 0.0
    pair[1].full = True
    theta = flat(pair[0].model)
    here, there = problem.example_gradients(theta), problem.example_gradients(anchor)
    parts = ("mezo_direction", "mezo_minibatch", "direction", "minibatch", "anchor")
    measured = [
        *_variance(_pair(problem, MEZO, seed, theta), here.mean(0), draws),
        *_variance(pair, here.mean(0) - there.mean(0), draws, directions),
        _variance(_pair(problem, MEZO, seed, anchor), there.mean(0), draws)[0],
    ]
    expected = *mezo(here), *svrg(here, there, directions)
    own, its = sum(expected[:2]), sum(expected[2:])
    off = {
        part: ((value - wanted) / whole, error / whole)
        for part, (value, error), wanted, whole in zip(
            parts, measured, expected, (own, own, its, its, its), strict=True
        )
    }
    unit = square(here)
    row: Row = {part: value / unit for part, (value, _) in zip(parts, measured, strict=True)}
    row |= {"mezo_variance": row["mezo_direction"] + row["mezo_minibatch"], "mezo_expected": own / unit}
    row |= {"variance": row["direction"] + row["minibatch"] + row["anchor"], "expected": its / unit}
    row |= {"expected_ratio": its / own, "full_batch_worth": worth(here), "noise_to_signal": worth(here) - 1}
    return {"distance": (theta - anchor).norm().item(), **row}, off


def _pair(problem: Problem, method: Method, seed: int, theta: Tensor, rate: float = 0.0) -> list[Stepper]:
    """Two optimizers at θ that draw the same directions; of MeZO's, the second has the training set as its batch."""
    pair = [Stepper(problem, method, seed, rate, rate) for _ in range(2)]
    for stepper in pair:
        put(stepper.model, theta)
    pair[1].full = method == MEZO
    return pair


def _variance(
    pair: list[Stepper], mean: Tensor, draws: int, directions: str = "shared"
) -> tuple[tuple[float, float], tuple[float, float]]:
    """From the direction and from the minibatch, each with its standard error.

    What the one with the whole training set estimates has the direction's part; in what differs is the minibatch's.
    """
    both = zip(*(estimates(stepper, draws, directions) for stepper in pair), strict=True)
    parts = [(((full - mean) ** 2).sum(), ((batch - full) ** 2).sum()) for batch, full in both]
    squares = torch.tensor(parts, dtype=torch.float64)
    direction, minibatch = zip(squares.mean(0).tolist(), (squares.std(0) / draws**0.5).tolist(), strict=True)
    return direction, minibatch


def estimates(stepper: Stepper, draws: int, directions: str) -> Iterator[Tensor]:
    """What so many steps estimate, without the anchor's own estimate, float64 (dimension,)."""
    optimizer, problem = stepper.optimizer, stepper.problem
    for _ in range(draws):
        step = optimizer.step_count
        stepper.steps(1)
        record = optimizer.trajectory[-1]
        (g,) = record.projected_gradients
        estimate = g * problem.z(optimizer.seed, step, FIRST_SLOT).double()
        if record.anchor_losses:
            (g,) = projected_gradients(record.anchor_losses, record.difference.span(EPS))
            slot = FIRST_SLOT if directions == "shared" else SEPARATE_SLOT
            estimate = estimate - g * problem.z(optimizer.seed, step, slot).double()
        yield estimate


def _rows(known: Row, seeds: Sequence[int], found: list[tuple[Row, dict[str, tuple[float, float]]]]) -> list[Row]:
    rows, worst = [row for row, _ in found], 0.0
    for part in found[0][1]:
        off, errors = zip(*(of[part] for _, of in found), strict=True)
        mean_off, error = abs(fmean(off)), math.hypot(*errors) / len(off)
        worst = max(worst, mean_off)
        if not mean_off <= max(_MOST_ERRORS * error, _MOST_OFF):
            off_by = f"{known['directions']}: {part} is {mean_off:.0%} of the variance off"
            raise Wrong(f"{off_by}, {mean_off / error:.1f} standard errors")
    means = over_seeds({**known, "correct": True}, seeds, rows)
    means[-1] |= {"off_theory": worst}
    means[-1] |= ratio([row["variance"] for row in rows], [row["mezo_variance"] for row in rows], "to_mezo")
    return means
