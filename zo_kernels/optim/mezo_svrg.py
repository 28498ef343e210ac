"""MeZO-SVRG: zeroth-order SGD with variance reduction (Gautam et al., arXiv 2404.08080)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .base import Closure, ZeroOrderOptimizer, _check_closure
from .weights import Excursion, Weight, Weights

_ANCHOR_SLOT = 2**17  # directions of the anchor's estimate
_SEPARATE_SLOT = 2**18  # directions of the estimate at the anchor, when it does not share those at θ


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
        anchor_lr: η₁, the rate of the full-batch steps.
        anchor_every: steps from one anchor to the next (q).
        shared_direction: use the same z for the two minibatch estimates. False draws them apart, as the published code
            does; their difference then keeps the variance of both.

    `anchor_lr` may be given for each group; schedulers change `lr` alone. One copy of the weights is kept. Other
    arguments, attributes, errors: `ZeroOrderOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        lr: float,
        anchor_lr: float = 1e-3,
        anchor_every: int = 5,
        shared_direction: bool = True,
        **options: Any,
    ):
        self.anchor_every = checks.integer("anchor_every", anchor_every, 1)
        self.anchor_lr = checks.number("anchor_lr", anchor_lr, 0.0)
        if not isinstance(shared_direction, bool):
            raise TypeError(f"shared_direction: expected a bool, got {type(shared_direction).__name__}")
        self.shared_direction = shared_direction
        self._forget()
        super().__init__(params, lr=lr, **options)

    def _forget(self) -> None:
        """No anchor: the next step takes one."""
        self._path: dict[int, list[float]] = {}  # θ = decay * anchor + sum path[seed] * z(seed), for each row
        self._path_decays: list[float] = []
        self._anchor_gradients: dict[int, float] = {}  # g, as seed -> coefficient
        self._dropped: frozenset[int] = frozenset()
        self._age: int | None = None  # steps since the anchor
        self._versions: list[int] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            param_group.setdefault("anchor_lr", self.anchor_lr)
            checks.number("anchor_lr", param_group["anchor_lr"], 0.0)
        super().add_param_group(param_group)

    def _on_other_weights(self) -> None:
        self._forget()

    def _anchors(self, weights: Sequence[Weight]) -> Sequence[Tensor]:
        for w in weights:
            anchor = self.state[w.tensor].get("anchor")
            if anchor is None or anchor.shape != w.tensor.shape or anchor.dtype != w.tensor.dtype:
                self.state[w.tensor]["anchor"] = w.tensor.detach().clone()
                self._forget()
        return [self.state[w.tensor]["anchor"] for w in weights]

    def _prepare(self) -> Weights:
        known = self._weights
        weights = super()._prepare()
        if weights is not known and self._age is not None and not self._changed_by_others(weights):
            # Tables built in the middle of a period: groups may have been added, and the masks must be taken again.
            missing = weights.rows - len(self._path_decays)
            self._path_decays += [1.0] * missing
            for row in self._path.values():
                row += [0.0] * missing
            with torch.no_grad():
                self._rebuild(weights, record=True)
        return weights

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
        _check_closure("closure", closure)
        _check_closure("full_closure", full_closure)
        assert full_closure is not None
        eps, rates, anchor_rates = self._eps(), self._rates(), self._rates("anchor_lr")
        weights = self._prepare()
        if self._age is None or self._age >= self.anchor_every or self._changed_by_others(weights):
            loss = self._anchor_step(weights, full_closure, eps, anchor_rates)
        else:
            loss = self._inner_step(weights, closure, eps, rates)
        self.step_count += 1
        return loss

    def _changed_by_others(self, weights: Weights) -> bool:
        """Weights that somebody loaded or set since the last step are not on the path from the anchor."""
        return self._versions is not None and self._versions != [w.tensor._version for w in weights.weights]

    def _anchor_step(self, weights: Weights, closure: Closure, eps: float, rates: Sequence[float]) -> Tensor | float:
        self._forget()
        for w in weights.weights:
            self.state[w.tensor]["anchor"].copy_(w.tensor)
        self._dropped = self._draw_dropped()
        active = weights.active(self._dropped)
        self._path_decays = [1.0] * weights.rows
        losses: list[Any] = []
        seeds = self._seeds(_ANCHOR_SLOT)
        gradients = self._probe_anchor(weights, active, closure, seeds, eps, losses, record=True)
        self._anchor_gradients = {s: g / len(seeds) for s, g in zip(seeds, gradients, strict=True)}
        self._age = 1
        self._advance(weights, self._anchor_gradients, rates)
        self.projected_gradients = gradients
        return sum(losses) / len(losses)

    def _inner_step(self, weights: Weights, closure: Closure, eps: float, rates: Sequence[float]) -> Tensor | float:
        assert self._age is not None
        active = weights.active(self._dropped)
        losses: list[Any] = []
        seeds = self._seeds()
        anchor_seeds = seeds if self.shared_direction else self._seeds(_SEPARATE_SLOT)
        try:
            here = self._probe(Excursion(weights, active, record=False), closure, seeds, eps, losses)
        except BaseException:
            self._rebuild(weights)
            raise
        there = self._probe_anchor(weights, active, closure, anchor_seeds, eps, [], record=False)
        estimate = dict(self._anchor_gradients)
        for s, g in zip(seeds, here, strict=True):
            estimate[s] = estimate.get(s, 0.0) + g / len(seeds)
        for s, g in zip(anchor_seeds, there, strict=True):
            estimate[s] = estimate.get(s, 0.0) - g / len(seeds)
        self._age += 1
        self._advance(weights, estimate, rates)
        self.projected_gradients = here
        return sum(losses) / len(losses)

    def _probe_anchor(
        self,
        weights: Weights,
        active: Sequence[int] | None,
        closure: Closure,
        seeds: Sequence[int],
        eps: float,
        losses: list[Any],
        *,
        record: bool,
    ) -> list[float]:
        """g of each seed at the anchor. The model holds θ̄ ± ε z, written from the snapshot, which stays as it is."""
        gradients = []
        try:
            # Weights of dropped blocks are at the anchor already: no step since has changed them.
            for seed in seeds:
                pair = []
                for signed in (eps, -eps):
                    weights.move({seed: signed}, active=active, record=record, from_anchor=True)
                    record = False
                    pair.append(self._evaluate(closure, losses))
                gradients.append(self._difference(pair, eps))
        except BaseException:
            self._rebuild(weights)
            raise
        return gradients

    def _advance(self, weights: Weights, estimate: dict[int, float], rates: Sequence[float]) -> None:
        """θ <- decay * θ - rate * sum estimate[seed] * z(seed), along the path."""
        decays = self._decays(rates)
        self._path_decays = [p * d for p, d in zip(self._path_decays, decays, strict=True)]
        for row in self._path.values():
            row[:] = [c * d for c, d in zip(row, decays, strict=True)]
        for seed, g in estimate.items():
            row = self._path.setdefault(seed, [0.0] * weights.rows)
            row[:] = [c - lr * g for c, lr in zip(row, rates, strict=True)]
        self._rebuild(weights)

    def _rebuild(self, weights: Weights, *, record: bool = False) -> None:
        """Write θ from the anchor and the path; with `record`, dropped blocks and masks too, as after loading."""
        if record:
            for w in weights.weights:
                if w.block in self._dropped:
                    w.tensor.copy_(self.state[w.tensor]["anchor"])
        if self._path:
            weights.move(
                self._path,
                decays=self._path_decays,
                active=weights.active(self._dropped),
                record=record,
                from_anchor=True,
            )
        else:
            for w in weights.weights:
                w.tensor.copy_(self.state[w.tensor]["anchor"])
        self._versions = [w.tensor._version for w in weights.weights]

    def _zo_state(self) -> dict[str, Any]:
        return {
            **super()._zo_state(),
            "anchor_every": self.anchor_every,
            "shared_direction": self.shared_direction,
            "path": {s: list(c) for s, c in self._path.items()},
            "path_decays": list(self._path_decays),
            "anchor_gradients": dict(self._anchor_gradients),
            "dropped": sorted(self._dropped),
            "age": self._age,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `ZeroOrderOptimizer.load_state_dict`; the anchor and the path from it, hence the weights, come back."""
        super().load_state_dict(state_dict)
        zo = state_dict["zo"]
        self.anchor_every, self.shared_direction = zo["anchor_every"], zo["shared_direction"]
        self._forget()
        self._path = {s: list(c) for s, c in zo["path"].items()}
        self._path_decays = list(zo["path_decays"])
        self._anchor_gradients = dict(zo["anchor_gradients"])
        self._dropped, age = frozenset(zo["dropped"]), zo["age"]
        for p in self.state:  # torch keeps the caller's tensors; a snapshot must be our own
            self.state[p]["anchor"] = self.state[p]["anchor"].clone()
        self._age = age
        self._prepare()
        self._versions = None  # the model may be loaded after its optimizer

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_versions": None}  # a copy's tensors count their own
