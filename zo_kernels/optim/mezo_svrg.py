"""MeZO-SVRG: zeroth-order SGD with variance reduction (Gautam et al., arXiv 2404.08080)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..trajectory import Kind, Setup
from .base import ZeroOrderOptimizer
from .draws import ANCHOR_SLOT, SEPARATE_SLOT
from .in_forward import InForwardProbes
from .interrupts import interrupts_held
from .losses import Closure, check_closure, decay_factors
from .numbers import Numbers, Row, on_host
from .path import Path
from .probes import InPlaceFromAnchor, Probes, RestoredInPlace
from .replay import Replay
from .shards import like, local
from .weights import Weight, Weights


class MeZOSVRG(ZeroOrderOptimizer):
    """SPSA with a control variate from a snapshot (the anchor θ̄).

    Every `anchor_every` steps, from a full (or large) batch,

        θ̄ <- θ,   g = estimate(full, θ̄),   θ <- (1 - anchor_lr * weight_decay) θ - anchor_lr * g

    and in the steps between, from a minibatch I,

        θ <- (1 - lr * weight_decay) θ - lr * [estimate(I, θ) - estimate(I, θ̄) + g]

    where estimate(B, θ) = mean_k (L_B(θ + ε z_k) - L_B(θ - ε z_k)) / 2ε * z_k. The anchor is a copy that no update
    changes; between anchors θ is always written as anchor + sum of directions, so passes in place leave no drift.
    Masks and dropped blocks are drawn with the anchor and kept until the next: the three estimates must live in one
    subspace.

    Source: Gautam et al., "Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models", arXiv 2404.08080.

    Args:
        lr: η₂, the rate of the steps between anchors.
        anchor_lr: η₁, the rate of the full-batch steps. None is twice the `lr` of the group, also while a scheduler
            changes that.
        anchor_every: steps from one anchor to the next (q).
        shared_direction: use the same z for the two minibatch estimates. False draws them apart, as the published code
            does; their difference then keeps the variance of both.

    `anchor_lr` may be given for each group; where it is a number, schedulers change `lr` alone. One copy of the
    weights is kept. Other arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        anchor_lr: float | None = None,
        anchor_every: int = 5,
        shared_direction: bool = True,
        **options: Any,
    ):
        self.anchor_every = checks.integer("anchor_every", anchor_every, 1)
        self.anchor_lr = _checked(anchor_lr)
        if not isinstance(shared_direction, bool):
            raise TypeError(f"shared_direction: expected a bool, got {type(shared_direction).__name__}")
        self.shared_direction = shared_direction
        self._forget()
        super().__init__(params, lr=lr, **options)

    def _forget(self) -> None:
        """No anchor: the next step takes one."""
        self._path: Path | None = None
        self._dropped: frozenset[int] = frozenset()
        self._age: int | None = None  # steps since the anchor

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            _checked(param_group.setdefault("anchor_lr", self.anchor_lr))
        super().add_param_group(param_group)

    def _on_other_weights(self) -> None:
        self._forget()

    def _anchors(self, weights: Sequence[Weight]) -> Sequence[Tensor]:
        for w in weights:
            anchor = self.state[w.parameter].get("anchor")
            if anchor is None or anchor.shape != w.parameter.shape or anchor.dtype != w.parameter.dtype:
                self.state[w.parameter]["anchor"] = w.parameter.detach().clone()
                self._forget()
        return [self._anchor(w) for w in weights]

    def _anchor(self, w: Weight) -> Tensor:
        """What is here of its snapshot, which is sharded as the parameter is."""
        return local(self.state[w.parameter]["anchor"])

    def _prepare(self) -> Weights:
        known = self._weights
        weights = super()._prepare()
        if weights is not known and self._path is not None and not self._recording.changed_by_others(weights):
            # Tables built in the middle of a period: groups may have been added, and the masks must be taken again.
            self._path.extend(weights.rows)
            with torch.no_grad():
                for w in weights.weights:
                    if w.block in self._dropped:
                        w.tensor.copy_(self._anchor(w))
                self._write(weights, record=True)
            self._recording.note_versions(weights)
        return weights

    def _agreed(self) -> list[str]:
        rates = [group["anchor_lr"] for group in self.param_groups]
        age = "none" if self._age is None else self._age
        return [*super()._agreed(), f"anchor_lr: {rates}", f"steps since the anchor: {age}"]

    def _options(self, weights: Weights, eps: float) -> list[str]:
        own = [f"anchor_every: {self.anchor_every}", f"shared_direction: {self.shared_direction}"]
        return [*super()._options(weights, eps), *own]

    def _anchor_rates(self) -> list[float]:
        """As `_rates`, for an anchor's step."""
        given = [_checked(group["anchor_lr"]) for group in self.param_groups for _ in range(2)]
        return [2 * lr if rate is None else rate for lr, rate in zip(self._rates(), given, strict=True)]

    def _steps_differ(self) -> str | None:
        return "MeZO-SVRG's steps at an anchor and between anchors are not alike"

    def _svrg_setup(self) -> dict[str, bool]:
        return {"svrg": True, "shared_direction": self.shared_direction, "anchored": self._age is not None}

    def _go_on_from(self, replay: Replay, setup: Setup) -> None:
        self._path, self._dropped, self._age = replay.path, replay.dropped, replay.age
        if replay.weights is not None and replay.weights.anchors is not None:
            for w, anchor in zip(replay.weights.weights, replay.weights.anchors, strict=True):
                self.state[w.parameter]["anchor"] = like(w.parameter, anchor)
        self.shared_direction = setup.shared_direction
        super()._go_on_from(replay, setup)

    @torch.no_grad()
    def step(self, closure: Closure, full_closure: Closure | None = None) -> Tensor | float:  # type: ignore[override]
        """One step; every `anchor_every`-th is a full-batch step.

        Args:
            closure: the loss on the step's minibatch; see `ZeroOrderOptimizer.step`. Called 4 * directions times
                between anchors, not at all in an anchor's step.
            full_closure: the loss on the whole (or a large) batch. Called 2 * directions times in an anchor's step.

        Returns, Raises:
            As `ZeroOrderOptimizer.step`. Weights are restored exactly, from the anchor.
        """
        with self._telling_others():
            check_closure("closure", closure)
            check_closure("full_closure", full_closure)
            assert full_closure is not None
            eps, rates, anchor_rates = self._eps(), self._rates(), self._anchor_rates()
            weights = self._prepare()
            if self._age is None or self._age >= self.anchor_every or self._recording.changed_by_others(weights):
                self._forget()
            self._begin_record(weights, eps)
        if self._age is None:
            return self._anchor_step(weights, full_closure, eps, anchor_rates)
        return self._inner_step(weights, closure, eps, rates)

    def _anchor_step(self, weights: Weights, closure: Closure, eps: float, rates: Sequence[float]) -> Tensor | float:
        for w in weights.weights:
            self._anchor(w).copy_(w.tensor)
        self._dropped = self._draw_dropped()
        seeds, seen = self._seeds(ANCHOR_SLOT), list[Any]()
        self._path = path = Path(weights.rows)
        try:
            pairs = self._probe(self._probes_from_anchor(weights), closure, seeds, eps, seen)
        except BaseException:
            self._forget()
            raise
        numbers = Numbers.of([pairs], eps, rates, decay_factors(rates, self._weight_decays()))
        with interrupts_held():
            path.ok = numbers.ok
            path.advance(path.start(seeds, numbers.gradients[0]), numbers.rates, numbers.decays)
            self._write(weights, record=True)
            self._age = 1
            self._took(weights, Kind.ANCHOR, rates, eps, numbers, pairs)
        return self._mean_loss(seen, pairs)

    def _inner_step(self, weights: Weights, closure: Closure, eps: float, rates: Sequence[float]) -> Tensor | float:
        assert self._age is not None and self._path is not None
        seeds, seen = self._seeds(), list[Any]()
        anchor_seeds = seeds if self.shared_direction else self._seeds(SEPARATE_SLOT)
        here = self._probe(self._probes_at_theta(weights), closure, seeds, eps, seen)
        there = self._probe(self._probes_from_anchor(weights), closure, anchor_seeds, eps, [])
        decays = decay_factors(rates, self._weight_decays())
        numbers = Numbers.of([here, there], eps, rates, decays, self._path.ok)
        estimate = self._path.estimate(seeds, numbers.gradients[0], anchor_seeds, numbers.gradients[1])
        with interrupts_held():
            self._path.advance(estimate, numbers.rates, numbers.decays)
            self._write(weights)
            self._age += 1
            self._took(weights, Kind.BETWEEN, rates, eps, numbers, here, there)
        return self._mean_loss(seen, here)

    def _probes_at_theta(self, weights: Weights) -> Probes:
        active = weights.active(self._dropped)
        if self._in_forward is not None:
            return InForwardProbes(self._in_forward, weights, active, watch=self._watches())
        return RestoredInPlace(weights, active, lambda: self._write(weights))

    def _probes_from_anchor(self, weights: Weights) -> Probes:
        active = weights.active(self._dropped)
        if self._in_forward is not None:
            watch = self._watches() and self._age is None
            return InForwardProbes(self._in_forward, weights, active, from_anchor=True, watch=watch)
        return InPlaceFromAnchor(weights, active, lambda: self._write(weights))

    def _write(self, weights: Weights, *, record: bool = False) -> None:
        """θ from the anchor and the path. Dropped blocks are at the anchor."""
        assert self._path is not None
        self._path.write(weights, weights.active(self._dropped), record=record)

    def _zo_state(self) -> dict[str, Any]:
        path = self._path
        return {
            **super()._zo_state(),
            "anchor_every": self.anchor_every,
            "shared_direction": self.shared_direction,
            # Lists, not mappings by seed: torch.distributed.checkpoint loads only keys that are there before.
            "path": [] if path is None else [[seed, on_host(row)] for seed, row in path.coefficients.items()],
            "path_decays": [] if path is None else on_host(path.decays),
            "anchor_gradients": [] if path is None else [[seed, float(g)] for seed, g in path.gradients.items()],
            "anchor_ok": path is None or bool(path.ok),
            "dropped": sorted(self._dropped),
            "age": self._age,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `ZeroOrderOptimizer.load_state_dict`; the anchor and the path from it, hence the weights, come back."""
        super().load_state_dict(state_dict)
        zo = state_dict["zo"]
        self.anchor_every, self.shared_direction = zo["anchor_every"], zo["shared_direction"]
        self._forget()
        if zo["age"] is not None:
            coefficients: dict[int, Row] = {seed: list(row) for seed, row in zo["path"]}
            decays = list(zo["path_decays"])
            self._path = Path(len(decays), decays, coefficients, dict(zo["anchor_gradients"]), zo["anchor_ok"])
        self._dropped, self._age = frozenset(zo["dropped"]), zo["age"]
        for p in self.state:  # torch keeps the caller's tensors; a snapshot must be our own
            self.state[p]["anchor"] = self.state[p]["anchor"].clone()
        self._prepare()
        self._recording.forget_versions()  # the model may be loaded after its optimizer


def _checked(anchor_lr: Any) -> float | None:
    return None if anchor_lr is None else checks.number("anchor_lr", anchor_lr, 0.0)
