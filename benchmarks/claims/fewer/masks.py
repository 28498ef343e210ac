"""Sparse-MeZO's mask, redrawn in every step under fixed thresholds or kept from the start: when do they differ?"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo

from ...bench.registry import Row
from ..arms import MaskedMeZO, library
from ..intervals import difference, over_seeds
from ..learning import Arm, Task, run
from .arms import unlike
from .study import Equal

SPARSITY = 0.75
KEPT, REDRAWN = "mask kept", "mask redrawn"
PARTS = ((0, 1), (-2, 2), (-4, 4), (-6, 4))  # the exponent of 2 of the rate, in parts of the best; steps, as many times


class Watched:
    """A task that also tells which share of the start's small weights have grown past their thresholds at the end."""

    def __init__(self, task: Task):
        self._task = task

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self._task.model(seed, dtype)

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        return self._task.closures(model, seed)

    def dev_loss(self, model: nn.Module, seed: int) -> float:
        return self._task.dev_loss(model, seed)

    def test(self, model: nn.Module, seed: int) -> Row:
        start = self._task.model(seed)
        sparse = zo.SparseMeZO(start, sparsity=SPARSITY, lr=1.0, eps=1e-3, seed=seed, parallel="off")
        state: dict[str, Any] = sparse.state_dict()["zo"]
        before = [p for group in sparse.param_groups for p in group["params"]]
        after = [p for p in model.parameters() if p.requires_grad]
        small = left = 0
        for p, q, h in zip(before, after, state["thresholds"], strict=True):
            if h is not None:
                mask = p.detach().abs() <= h
                small += int(mask.sum())
                left += int((mask & (q.detach().abs() > h)).sum())
        return self._task.test(model, seed) | {"left_mask": left / small}


def arms(options: Namespace) -> dict[bool, Arm]:
    """By whether the mask is redrawn: the library's, whose bits are those of `MaskedMeZO`."""

    def arm(redrawn: bool) -> Arm:
        make = library("", options, sparsity=SPARSITY, mask="redrawn" if redrawn else "kept").make
        of = {"sparsity": SPARSITY, "kind": "small", "redrawn": redrawn, "backend": options.backend}
        facts = {"sparsity": SPARSITY, "mask": "small", "redrawn": redrawn}
        wrong = partial(unlike, make, partial(MaskedMeZO, **of))
        return Arm(REDRAWN if redrawn else KEPT, make, wrong, facts=facts, guess=4.0)

    return {redrawn: arm(redrawn) for redrawn in (True, False)}


def compared(study: Equal, options: Namespace) -> list[Row]:
    """Rows of both masks at the best rate of the kept one and at parts of it; differences are redrawn - kept."""
    both, rows = arms(options), list[Row]()
    study.check(both[True])
    best, watched = study.result(both[False]).lr, Watched(study.task)
    for exponent, times in PARTS:
        lr, steps = best * 2.0**exponent, times * study.steps
        curves = {
            redrawn: [run(watched, arm, lr, seed, steps) for seed in study.seeds] for redrawn, arm in both.items()
        }
        for redrawn, arm in both.items():
            found = [{"start_loss": c.losses[0], "dev_loss": c.losses[-1], **c.test} for c in curves[redrawn]]
            known = {"correct": True, "arm": arm.name, **arm.facts, "lr": lr, "lr_part_exponent": exponent}
            rows += over_seeds(known | {"steps": steps}, study.seeds, found)
            if redrawn:
                ends = [[c.losses[-1] for c in curves[key]] for key in (True, False)]
                rows[-1] |= difference(*ends, "dev_loss")
    return rows
