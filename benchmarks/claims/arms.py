"""The methods that learn: the library's optimizers, and the masks of Sparse-MeZO's ablations."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
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
_CHECKED_LR = 1e-3


def library(name: str, options: Namespace, *, dtype: torch.dtype = torch.float32, **method: Any) -> Arm:
    """MeZO with `sparsity=`, `drop=` or none of them, which is what the other classes are; checked to the last bit."""

    def make(model: nn.Module, lr: float, seed: int) -> zo.ZeroOrderOptimizer:
        return zo.MeZO(model, lr=lr, eps=EPS, seed=seed, parallel="off", backend=options.backend, **method)

    return Arm(name, make, wrong_step, dtype, dict(method))


class MaskedMeZO:
    """MeZO in place on a part of each tensor, for the ablations of Sparse-MeZO (arXiv 2402.15751).

    With `kind` "small" and `redrawn` it is `zo.SparseMeZO`, to the last bit.

    Args:
        model: its parameters are perturbed.
        sparsity: the fraction of each tensor left alone.
        kind: "small", "large" or "random": the weights that take part.
        redrawn: whether each step takes the mask from its own weights, by thresholds that stay; else the mask stays.
    """

    def __init__(
        self, model: nn.Module, lr: float, seed: int, *, sparsity: float, kind: str, redrawn: bool, backend: str | None
    ):
        large = kind == "large"
        left = 1.0 - sparsity if large else sparsity
        sparse = zo.SparseMeZO(model, sparsity=left, lr=lr, eps=EPS, seed=seed, parallel="off", perturb="in_place")
        state = sparse.state_dict()["zo"]
        self.params = [p for group in sparse.param_groups for p in group["params"]]
        self._lr, self._seed, self._kind, self._steps = lr, seed, kind, 0
        self._options = {"param_ids": state["param_ids"], "backend": backend}
        # A tensor whose magnitudes do not separate has no threshold: all of it takes part.
        every = -math.inf if large else math.inf
        self._thresholds = [every if h is None else h for h in state["thresholds"]]
        self._kept = None if redrawn else self.drawn()

    def drawn(self) -> list[Tensor]:
        """A mask for each parameter, of the weights as they are."""
        small = [p.detach().abs() <= h for p, h in zip(self.params, self._thresholds, strict=True)]
        if self._kind == "random":
            generator = torch.Generator().manual_seed(self._seed)
            orders = [torch.randperm(m.numel(), generator=generator) for m in small]
            return [(o < int(m.sum())).view_as(m).to(m.device) for o, m in zip(orders, small, strict=True)]
        return [~m for m in small] if self._kind == "large" else small

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        masks = self._kept or self.drawn()
        seed = direction_seed(self._seed, self._steps, FIRST_SLOT)
        self._steps += 1

        def move(scale: float) -> None:
            zo.add_noise_(self.params, seed, scale, masks=masks, **self._options)

        move(EPS)
        above = closure()
        move(-2 * EPS)
        below = closure()
        move(EPS - self._lr * ((above.item() - below.item()) / (2 * EPS)))
        return above


def masked(name: str, options: Namespace, *, sparsity: float, kind: str, redrawn: bool) -> Arm:
    """An ablation. Its twin on small weights must take the library's step, and it may not move too many weights."""
    of = partial(MaskedMeZO, sparsity=sparsity, backend=options.backend)
    library_and_twin = library("", options, sparsity=sparsity).make, partial(of, kind="small", redrawn=redrawn)

    def wrong(steps: Any, model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
        params = steps.params
        before = [p.detach().clone() for p in params]

        @torch.no_grad()
        def stepped(steps: Any) -> list[Tensor]:
            """Copies of the weights after a step; the weights are put back."""
            steps.step(loss)
            after = [p.detach().clone() for p in params]
            torch._foreach_copy_(params, before)
            return after

        if not all(map(torch.equal, *(stepped(make(model, _CHECKED_LR, 0)) for make in library_and_twin))):
            return "on small weights it does not take SparseMeZO's step"
        for after, p in zip(stepped(steps), before, strict=True):
            # z is 0 or too small to move a weight for a few elements; ties at a threshold are on one side of it.
            moved, ties = int((after != p).sum()), p.numel() - p.abs().unique().numel() + 1
            if moved > p.numel() - int(sparsity * p.numel()) + ties:
                return f"{moved} of {p.numel()} weights moved, with sparsity {sparsity}"
        return None

    facts = {"sparsity": sparsity, "mask": kind, "redrawn": redrawn}
    return Arm(name, partial(of, kind=kind, redrawn=redrawn), wrong, facts=facts)
