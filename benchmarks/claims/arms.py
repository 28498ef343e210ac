"""The methods that the claims compare: the library's optimizers, and masks that it does not offer."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.estimators.draws import FIRST_SLOT
from zo_kernels.spec import direction_seed

from ..step.exact import wrong_step
from .learning import Arm

EPS = 1e-3


def library(name: str, options: Namespace, *, dtype: torch.dtype = torch.float32, **method: Any) -> Arm:
    """MeZO with `sparsity=` or `drop=` or none of them, which is what the other classes are."""

    def make(model: nn.Module, lr: float, seed: int) -> zo.ZeroOrderOptimizer:
        return zo.MeZO(model, lr=lr, eps=EPS, seed=seed, parallel="off", backend=options.backend, **method)

    def wrong(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
        return wrong_step(optimizer, model, loss)

    return Arm(name, make, wrong, dtype, dict(method))


class MaskedMeZO:
    """MeZO in place on a part of each tensor, for the ablations of Sparse-MeZO (arXiv 2402.15751).

    With `kind` "small" and `redrawn` it is `zo.SparseMeZO`, to the last bit.

    Args:
        model: its parameters are perturbed.
        sparsity: the fraction of each tensor left alone.
        kind: "small", "large" or "random": the weights that take part.
        redrawn: masks are taken from the weights in every step by thresholds that stay, else they stay themselves.
    """

    def __init__(
        self, model: nn.Module, lr: float, seed: int, *, sparsity: float, kind: str, redrawn: bool, backend: str | None
    ):
        options: dict[str, Any] = {"lr": lr, "eps": EPS, "seed": seed, "parallel": "off", "perturb": "in_place"}
        sparse = zo.SparseMeZO(model, sparsity=sparsity, **options)
        state = sparse.state_dict()["zo"]
        self.params = [p for group in sparse.param_groups for p in group["params"]]
        self._ids, self._lr, self._seed, self._backend = state["param_ids"], lr, seed, backend
        self._kind, self._steps = kind, 0
        if kind == "large":
            complement = zo.SparseMeZO(model, sparsity=1.0 - sparsity, **options)
            heights, dense = complement.state_dict()["zo"]["thresholds"], -math.inf
        else:
            heights, dense = state["thresholds"], math.inf
        # A tensor whose magnitudes do not separate has none: all of it takes part.
        self._thresholds = [dense if h is None else h for h in heights]
        self._masks = None if redrawn else self._drawn()

    def _drawn(self) -> list[Tensor]:
        if self._kind == "random":
            generator = torch.Generator().manual_seed(self._seed)
            taken = [p.detach().abs() <= h for p, h in zip(self.params, self._thresholds, strict=True)]
            orders = [torch.randperm(p.numel(), generator=generator) for p in self.params]
            return [(order < int(t.sum())).view_as(t).to(t.device) for order, t in zip(orders, taken, strict=True)]
        if self._kind == "large":
            return [p.detach().abs() > h for p, h in zip(self.params, self._thresholds, strict=True)]
        return [p.detach().abs() <= h for p, h in zip(self.params, self._thresholds, strict=True)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        masks = self._drawn() if self._masks is None else self._masks
        self._steps += 1
        seed = direction_seed(self._seed, self._steps - 1, FIRST_SLOT)

        def move(scale: float) -> None:
            zo.add_noise_(self.params, seed, scale, param_ids=self._ids, masks=masks, backend=self._backend)

        move(EPS)
        above = closure()
        move(-2 * EPS)
        below = closure()
        g = (above.item() - below.item()) / (2 * EPS)
        move(EPS - self._lr * g)
        return above


def masked(name: str, options: Namespace, *, sparsity: float, kind: str, redrawn: bool) -> Arm:
    """An ablation's arm. It is checked by its twin on small weights, which must take the library's step."""
    method: dict[str, Any] = {"sparsity": sparsity, "redrawn": redrawn, "backend": options.backend}

    def wrong(steps: Any, model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
        before = [p.detach().clone() for p in steps.params]
        ends = []
        for make in (library("", options, sparsity=sparsity).make, partial(MaskedMeZO, kind="small", **method)):
            optimizer = make(model, 1e-3, 0)
            optimizer.step(loss)
            ends.append(_taken(steps.params, before))
        if not all(map(torch.equal, *ends)):
            return "on small weights it does not take SparseMeZO's step"
        steps.step(loss)
        moved = [int((p != b).sum()) for p, b in zip(steps.params, before, strict=True)]
        _taken(steps.params, before)
        for p, count in zip(steps.params, moved, strict=True):
            # z is 0 or too small to move a weight for a few elements; ties at a threshold are on one side of it.
            if count > p.numel() - int(sparsity * p.numel()) + _ties(p):
                return f"{count} of {p.numel()} weights moved, with sparsity {sparsity}"
        return None

    arm = Arm(name, partial(MaskedMeZO, kind=kind, **method), wrong)
    return replace(arm, facts={"sparsity": sparsity, "mask": kind, "redrawn": redrawn})


@torch.no_grad()
def _taken(params: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """Copies of the parameters, which are put back."""
    after = [p.detach().clone() for p in params]
    for p, b in zip(params, before, strict=True):
        p.copy_(b)
    return after


def _ties(p: Tensor) -> int:
    """Elements whose magnitude another one has."""
    return p.numel() - p.detach().abs().unique().numel() + 1
