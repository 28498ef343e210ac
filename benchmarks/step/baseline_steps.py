"""Whole steps without zo_kernels, over one of the passes of `kernels/baselines.py`."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bench.timing import Watch
from ..kernels.baselines import BaselinePass, Masks


@dataclass
class Baseline:
    """Takes steps without zo_kernels.

    Args:
        params: all that are trained.
        apply: the pass.
        fused: whether to restore and update in one pass, which MeZO's code does in two.
        closure: the loss.
        watch: notes the passes; the closure notes the forwards in it.
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

    def _pass(self, params: Sequence[Tensor], factor: float, step: float, masks: Masks = None, seed: int = 0) -> None:
        with self.watch.part("passes"):
            self.apply(params, seed or self.seed, factor, step, masks)

    def _gradient(self, params: Sequence[Tensor], masks: Masks = None) -> float:
        """The projected gradient; the parameters are left at θ - ε z."""
        self._pass(params, 1.0, self.eps, masks)
        above = self.closure().item()
        self._pass(params, -2.0, self.eps, masks)
        below = self.closure().item()
        return (above - below) / (2 * self.eps)

    def _update(self, params: Sequence[Tensor], g: float, masks: Masks = None) -> None:
        """From θ - ε z to θ - lr g z."""
        if self.fused:
            self._pass(params, 1.0, self.eps - self.lr * g, masks)
        else:
            self._pass(params, 1.0, self.eps, masks)
            self._pass(params, g, -self.lr, masks)

    @torch.no_grad()
    def spsa(self) -> None:
        """A step of MeZO, of Sparse-MeZO or of LeZO."""
        self.seed += 1
        out = {p for block in random.Random(self.seed).sample(self.blocks, self.dropped) for p in block}
        known = [(p, h) for p, h in zip(self.params, self.thresholds, strict=True) if p not in out]
        params, masks = [p for p, _ in known], None
        if any(h is not None for _, h in known):
            with self.watch.part("passes"):
                masks = [None if h is None else p.abs() <= h for p, h in known]
        self._update(params, self._gradient(params, masks), masks)

    @torch.no_grad()
    def fzoo(self, directions: int) -> None:
        """A step of FZOO: a loss at θ and at each θ + ε z, restored after each; then an update along each direction."""
        here, losses = self.closure().item(), dict[int, float]()
        for _ in range(directions):
            self.seed += 1
            self._pass(self.params, 1.0, self.eps)
            losses[self.seed] = self.closure().item()
            if not self.fused or len(losses) < directions:  # eager PyTorch's passes have one direction each
                self._pass(self.params, -1.0, self.eps)
        spread = statistics.stdev(losses.values()) or math.inf  # no update where all losses are equal
        for seed, loss in losses.items():
            g = (loss - here) / (directions * spread)
            if self.fused and seed == self.seed:
                self._pass(self.params, 1.0, -self.eps - self.lr * g)
            else:
                self._pass(self.params, g, -self.lr, seed=seed)

    @torch.no_grad()
    def svrg(self, steps: int) -> None:
        """A round of MeZO-SVRG: a full-batch step at a new anchor, then steps whose two estimates share z."""
        self.seed += 1
        anchor_seed = self.seed
        with self.watch.part("passes"):
            anchor = [p.data.clone() for p in self.params]
        full = self._gradient(self.params)
        self._update(self.params, full)
        for _ in range(steps - 1):
            self.seed += 1
            here = self._gradient(self.params)
            self._swap(anchor)
            there = self._gradient(self.params)
            self._pass(self.params, 1.0, self.eps)
            self._swap(anchor)
            self._update(self.params, here - there)
            self._pass(self.params, full, -self.lr, seed=anchor_seed)

    def _swap(self, anchor: list[Tensor]) -> None:
        """Exchange the model's weights for the anchor's, without copying either."""
        for i, p in enumerate(self.params):
            p.data, anchor[i] = anchor[i], p.data
