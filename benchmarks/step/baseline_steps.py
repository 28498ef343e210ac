"""Whole steps without zo_kernels, over one of the passes of `baselines`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bench.timing import Watch
from ..kernels.baselines import BaselinePass


@dataclass
class Baseline:
    """What a step needs.

    Args:
        params: all that are trained.
        apply: the pass.
        fused: whether to restore and update in one pass, which MeZO's code does in two.
        closure: the loss.
        watch: told of the passes; the closure tells it of the forwards.
        thresholds: for each parameter the h of its magnitude mask, or None.
        blocks: parameters of each transformer block.
        dropped: how many blocks sit out a step.
    """

    params: Sequence[nn.Parameter]
    apply: BaselinePass
    fused: bool
    closure: Callable[[], Tensor]
    watch: Watch
    eps: float
    lr: float
    thresholds: Sequence[float | None]
    blocks: Sequence[Sequence[nn.Parameter]] = ()
    dropped: int = 0
    seed: int = 0

    def _pass(
        self, params: Sequence[Tensor], factor: float, step: float, masks: Sequence[Tensor | None] | None
    ) -> None:
        with self.watch.part("passes"):
            self.apply(params, self.seed, factor, step, masks)

    def _gradient(self, params: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> float:
        """The projected gradient; the parameters are left at θ - ε z."""
        self._pass(params, 1.0, self.eps, masks)
        above = self.closure().item()
        self._pass(params, -2.0, self.eps, masks)
        below = self.closure().item()
        return (above - below) / (2 * self.eps)

    def _update(self, params: Sequence[Tensor], g: float, masks: Sequence[Tensor | None] | None) -> None:
        """From θ - ε z to θ - lr g z."""
        if self.fused:
            self._pass(params, 1.0, self.eps - self.lr * g, masks)
        else:
            self._pass(params, 1.0, self.eps, masks)
            self._pass(params, g, -self.lr, masks)

    def _masks(self, params: Sequence[Tensor]) -> list[Tensor | None] | None:
        of = {id(p): h for p, h in zip(self.params, self.thresholds, strict=True) if h is not None}
        if not of:
            return None
        with self.watch.part("passes"):
            return [p.abs() <= of[id(p)] if id(p) in of else None for p in params]

    @torch.no_grad()
    def spsa(self) -> None:
        """A step of MeZO, of Sparse-MeZO or of LeZO."""
        self.seed += 1
        out = {id(p) for block in random.Random(self.seed).sample(self.blocks, self.dropped) for p in block}
        params = [p for p in self.params if id(p) not in out]
        masks = self._masks(params)
        g = self._gradient(params, masks)
        self._update(params, g, masks)

    @torch.no_grad()
    def svrg(self, steps: int) -> None:
        """A round of MeZO-SVRG: a full-batch step at a new anchor, then steps whose two estimates share z."""
        self.seed += 1
        anchor_seed = self.seed
        with self.watch.part("passes"):
            anchor = [p.data.clone() for p in self.params]
        full = self._gradient(self.params, None)
        self._update(self.params, full, None)
        for _ in range(steps - 1):
            self.seed += 1
            here = self._gradient(self.params, None)
            self._swap(anchor)
            there = self._gradient(self.params, None)
            self._pass(self.params, 1.0, self.eps, None)
            self._swap(anchor)
            self._update(self.params, here - there, None)
            with self.watch.part("passes"):
                self.apply(self.params, anchor_seed, full, -self.lr)

    def _swap(self, anchor: list[Tensor]) -> None:
        """Exchange the model's weights for the anchor's, without copying either."""
        for i, p in enumerate(self.params):
            p.data, anchor[i] = anchor[i], p.data
