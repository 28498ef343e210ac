"""`zo.find_lr` for each run, beside the best rate of the grid: the loss at the end, and the price."""

from __future__ import annotations

import math
import warnings
from functools import partial
from statistics import fmean

import torch

import zo_kernels as zo

from ...bench.registry import Row
from ..intervals import difference, over_seeds, ratio
from ..learning import Arm
from .study import Equal

CLOSE = 1.05  # of the loss that the grid's best rate ends with


def found(study: Equal, arm: Arm) -> list[Row]:
    """Rows of runs with a rate of their own, compared in pairs with those of the grid's best rate.

    `forwards_price`: of the search, on average; `forwards_price_share`: in parts of the run's own forwards, which it
    comes on top of. `loss_ratio`: the dev loss at the end in parts of that of the best rate.
    """
    task, best = study.task, study.result(arm)
    rates, prices, curves = list[float](), list[int](), []
    for seed in study.seeds:
        model = task.model(seed, arm.dtype)
        make = partial(_made, arm, seed)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no rate lowered the loss; the run shows it
            search = zo.find_lr(model, partial(task.closures, model, seed), optimizer=make)
        rates.append(search.lr)
        prices.append(search.forwards)
        curves.append(study.run(arm, search.lr, seed))
    rows = over_seeds(
        {"correct": True, "arm": arm.name, **arm.facts, "forwards": arm.forwards * study.steps_of(arm)},
        study.seeds,
        [
            {"start_loss": curve.losses[0], "dev_loss": curve.losses[-1], "lr": lr, "forwards_price": price}
            for curve, lr, price in zip(curves, rates, prices, strict=True)
        ],
    )
    ends = [curve.losses[-1] for curve in curves], [curve.losses[-1] for curve in best.curves]
    rows[-1] |= {"lr": math.exp(fmean(map(math.log, rates))), "lr_lowest": min(rates), "lr_highest": max(rates)}
    least = fmean(ends[1])
    rows[-1] |= {"grid_lr": best.lr, "grid_dev_loss": least if math.isfinite(least) else None}
    rows[-1] |= difference(*ends, "dev_loss")
    rows[-1] |= {"forwards_price_share": fmean(prices) / rows[-1]["forwards"], **ratio(*ends, "loss", CLOSE)}
    return rows


def _made(arm: Arm, seed: int, model: torch.nn.Module, lr: float) -> zo.ZeroOrderOptimizer:
    optimizer: zo.ZeroOrderOptimizer = arm.make(model, lr, seed)
    return optimizer
