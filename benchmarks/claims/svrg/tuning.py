"""The learning rates that a method does best with, on seeds that are not those of the runs that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .draws import Draws
from .methods import Formula, Method

TUNING_SEEDS = (1000, 1001)
_SPSA, _GRADIENT = range(-11, -6), range(-5, 0)  # exponents of 2 to begin with
_RATIOS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # lr / anchor_lr of MeZO-SVRG; 0 leaves the anchors' steps alone
_FIRST_RATIOS = 4
_MOST_ROUNDS = 12

Point = tuple[int, float]  # exponent, ratio


@dataclass(frozen=True)
class Tuned:
    """The best point of a grid in steps of 2; or rates that were given, none tried.

    Args:
        lr, anchor_lr: the rates; anchor_lr is None for other methods than MeZO-SVRG.
        loss: there, above the floor, the mean of the tuning seeds.
        loss_of_anchors_alone: the best with lr = 0; None for other methods than MeZO-SVRG.
        tried: how many points.
        at_edge: whether larger or smaller rates were not tried. A ratio of 0 is no edge.
    """

    lr: float
    anchor_lr: float | None
    loss: float | None = None
    loss_of_anchors_alone: float | None = None
    tried: int = 0
    at_edge: bool = False


def tune(method: Method, draws: Draws, steps: int) -> Tuned:
    """The rates with which the training loss is lowest after so many steps. The grid grows until they are inside."""
    exponents = list(_GRADIENT if method.gradient else _SPSA)
    ratios = list(_RATIOS[:_FIRST_RATIOS]) if method.anchor_every else [1.0]
    found = _losses(method, draws, steps, [(k, r) for k in exponents for r in ratios])
    for _ in range(_MOST_ROUNDS):
        k, r = min(found, key=lambda point: found[point])
        new: list[Point] = []
        if k in (exponents[0], exponents[-1]):
            further = k - 1 if k == exponents[0] else k + 1
            exponents = sorted([*exponents, further])
            new += [(further, ratio) for ratio in ratios]
        if method.anchor_every and r == ratios[-1] and len(ratios) < len(_RATIOS):
            ratios.append(_RATIOS[len(ratios)])
            new += [(exponent, ratios[-1]) for exponent in exponents]
        if not new:
            break
        found |= _losses(method, draws, steps, new)
    k, r = min(found, key=lambda point: found[point])
    svrg = bool(method.anchor_every)
    return Tuned(
        lr=r * 2.0**k,
        anchor_lr=2.0**k if svrg else None,
        loss=found[k, r],
        loss_of_anchors_alone=min(found[point] for point in found if point[1] == 0.0) if svrg else None,
        tried=len(found),
        at_edge=k in (exponents[0], exponents[-1]) or (svrg and r == ratios[-1]),
    )


@torch.no_grad()
def _losses(method: Method, draws: Draws, steps: int, points: Sequence[Point]) -> dict[Point, float]:
    """Above the floor, at the end; infinite where a run diverges."""
    formula = Formula(method, draws, torch.tensor([[r * 2.0**k, 2.0**k] for k, r in points], dtype=torch.float64))
    for _ in range(steps):
        formula.step()
    losses = (formula.loss().double() - draws.problem.floor).mean(0).nan_to_num(torch.inf, torch.inf)
    return dict(zip(points, losses.tolist(), strict=True))
