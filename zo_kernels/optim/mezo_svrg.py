"""MeZO-SVRG: zeroth-order SGD with variance reduction (Gautam et al., arXiv 2404.08080)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, names
from ..closures.losses import Closure, OutOfRange, Refused, check_closure, decay_factors
from ..estimators.draws import ANCHOR_SLOT, SEPARATE_SLOT
from ..estimators.numbers import Numbers
from ..estimators.path import Path
from ..interrupts import Call, signals_held
from ..perturbation.in_place import InPlaceFromAnchor, Probes, RestoredInPlace
from ..runs import state
from ..runs.attempt import Attempt, attempted
from ..runs.replay import Replay
from ..trajectory import Kind, Setup
from ..weights.rows import on_host
from ..weights.shards import is_sharded, like, local
from ..weights.tables import Weight, Weights
from .base import ZeroOrderOptimizer


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

    _more_options = ("anchor_lr",)

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
        self._age: int | None = None  # steps since the anchor; first, since the rest means nothing without
        self._path: Path | None = None
        self._dropped: frozenset[int] = frozenset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch refuses anything else, and says so
            _checked(param_group.setdefault("anchor_lr", self.anchor_lr))
        super().add_param_group(param_group)

    def _trained_names(self) -> set[str]:
        bare = names.bare(self._names)
        return {bare[p] for p in self._trainable()}

    def _on_other_weights(self) -> None:
        self._forget()

    def _anchors(self, weights: Sequence[Weight]) -> Sequence[Tensor]:
        for w in weights:
            anchor = self.state[w.parameter].get("anchor")
            if anchor is None or anchor.shape != w.parameter.shape or anchor.dtype != w.parameter.dtype:
                self.state[w.parameter]["anchor"] = w.parameter.detach().clone()
                self._forget()
            elif not is_sharded(anchor) and anchor.stride() != w.parameter.stride():
                # A module that runs on it, moved to another device, is to see what it sees of the parameter.
                self.state[w.parameter]["anchor"] = w.parameter.detach().clone().copy_(anchor)
        return [self._anchor(w) for w in weights]

    def _anchor(self, w: Weight) -> Tensor:
        """What is here of its snapshot, which is sharded as the parameter is."""
        return local(self.state[w.parameter]["anchor"])

    def _prepare(self) -> Weights:
        known = self._weights
        weights = super()._prepare()
        if weights is not known and self._age is not None and not self._recording.changed_by_others(weights):
            self._weights = None  # until this is done, too
            # Tables built in the middle of a period: groups may have been added, and the masks must be taken again.
            assert self._path is not None
            self._path.extend(weights.rows)
            with torch.no_grad():
                for w in weights.weights:
                    if w.block in self._dropped:
                        w.tensor.copy_(self._anchor(w))
                self._write(weights, record=True)
            self._recording.note_versions(weights)
            self._weights = weights
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
        begun = replay.trajectory.setups[-1][0] < len(replay.trajectory)
        if not (begun or setup.anchored) or {w.name for w in setup.weights} != self._trained_names():
            self._forget()  # the anchor is one of other weights, or was given up already
        if replay.weights is not None and replay.weights.anchors is not None:
            for w, anchor in zip(replay.weights.weights, replay.weights.anchors, strict=True):
                self.state[w.parameter]["anchor"] = like(w.parameter, anchor)
        self.shared_direction = setup.shared_direction
        super()._go_on_from(replay, setup)

    @attempted
    def step(self, closure: Closure | None = None, full_closure: Closure | None = None) -> Tensor | float:  # type: ignore[override]
        """One step; every `anchor_every`-th is a full-batch step.

        Args:
            closure: the loss on the step's minibatch; see `ZeroOrderOptimizer.step`. Called 4 * directions times
                between anchors, not at all in an anchor's step.
            full_closure: the loss on the whole (or a large) batch. Called 2 * directions times in an anchor's step.

        Returns, Raises:
            As `ZeroOrderOptimizer.step`. Weights are restored exactly, from the anchor.
        """
        attempt = self._attempt
        assert attempt is not None
        with self._telling_others():
            closure, full_closure = check_closure("closure", closure), check_closure("full_closure", full_closure)
            eps, rates, anchor_rates = self._eps(), self._rates(), self._anchor_rates()
            weights = self._prepare()
            self._check_whole(weights)
            weights.reach.check_eps(eps)
            if self._age is None or self._age >= self.anchor_every or self._recording.changed_by_others(weights):
                self._forget()
            self._closures.begin(weights, self._steps_since_built)
            self._begin_record(weights, eps)
        if self._age is None:
            return self._anchor_step(attempt, weights, full_closure, eps, anchor_rates)
        return self._inner_step(attempt, weights, closure, eps, rates)

    def _anchor_step(
        self, attempt: Attempt, weights: Weights, closure: Closure, eps: float, rates: Sequence[float]
    ) -> Tensor | float:
        for w in weights.weights:
            self._anchor(w).copy_(w.tensor)
        for p in self.state.keys() - {w.parameter for w in weights.weights}:
            self.state[p].pop("anchor", None)  # of one that is frozen now
        self._dropped = self._draw_dropped()
        seeds, seen = self._seeds(ANCHOR_SLOT), list[Any]()
        self._path = Path(weights.rows)
        attempt.probes = probes = self._probes_from_anchor(weights)
        pairs = self._probe(probes, closure, seeds, eps, seen)
        decays = decay_factors(rates, self._weight_decays())
        numbers = Numbers.of([pairs], eps, rates, decays, reach=weights.reach)
        if numbers.refusal is not None:
            raise Refused(OutOfRange, numbers.refusal, of="")
        path = Path.started(weights.rows, seeds, numbers)
        taking = self._taking(attempt, weights, Kind.ANCHOR, rates, eps, numbers, pairs)
        self._write(weights, path, record=True, then=[partial(setattr, self, "_age", 1), *taking])
        self._taken(attempt, weights)
        return self._mean_loss(seen, pairs)

    def _inner_step(
        self, attempt: Attempt, weights: Weights, closure: Closure, eps: float, rates: Sequence[float]
    ) -> Tensor | float:
        assert self._age is not None and self._path is not None
        seeds, seen = self._seeds(), list[Any]()
        anchor_seeds = seeds if self.shared_direction else self._seeds(SEPARATE_SLOT)
        attempt.probes = probes = self._probes_at_theta(weights)
        here = self._probe(probes, closure, seeds, eps, seen)
        attempt.probes = probes = self._probes_from_anchor(weights)
        there = self._probe(probes, closure, anchor_seeds, eps, [])
        decays, others = decay_factors(rates, self._weight_decays()), list(self._path.gradients.values())
        numbers = Numbers.of([here, there], eps, rates, decays, self._path.ok, reach=weights.reach, others=others)
        if numbers.refusal is not None:
            raise Refused(OutOfRange, numbers.refusal, of="")
        estimate = self._path.estimate(seeds, numbers.gradients[0], anchor_seeds, numbers.gradients[1])
        path = self._path.advanced(estimate, numbers)
        taking = self._taking(attempt, weights, Kind.BETWEEN, rates, eps, numbers, here, there)
        self._write(weights, path, then=[partial(setattr, self, "_age", self._age + 1), *taking])
        self._taken(attempt, weights)
        return self._mean_loss(seen, here)

    def _restore(self, probes: Probes, weights: Weights) -> bool:
        probes.to({})
        if weights.torn:
            self._write(weights)  # all of it, from the anchor
        return True

    def _probes_at_theta(self, weights: Weights) -> Probes:
        active = weights.active(self._dropped)
        if self._in_forward is not None:
            return self._probes_in_forward(weights, active)
        return RestoredInPlace(weights, active, self._unwritten(weights), lambda: self._write(weights))

    def _probes_from_anchor(self, weights: Weights) -> Probes:
        active = weights.active(self._dropped)
        if self._in_forward is not None:
            return self._probes_in_forward(weights, active, from_anchor=True)
        return InPlaceFromAnchor(weights, active, self._unwritten(weights), lambda: self._write(weights))

    def _write(
        self, weights: Weights, path: Path | None = None, *, record: bool = False, then: Sequence[Call] = ()
    ) -> None:
        """θ from the anchor and the path, or from another that takes its place. Dropped blocks are at the anchor."""
        path = path or self._path
        assert path is not None
        then = [partial(setattr, self, "_path", path), *then]
        path.write(weights, weights.active(self._dropped), record=record, then=then)

    def _holds(self) -> bool:
        """Whether the anchor is of the weights that are trained now; those of groups that came later are at it."""
        if self._age is None or self._path is None:
            return False
        groups = self.param_groups[: self._path.rows // 2]
        trained = {p for g in groups for p in g["params"] if p.requires_grad}
        return trained == {p for p, kept in self.state.items() if "anchor" in kept}

    def _zo_state(self) -> dict[str, Any]:
        holds = self._holds()  # if not, the next step takes another anchor
        path = self._path if holds else None
        return {
            **super()._zo_state(),
            "anchor_every": self.anchor_every,
            "shared_direction": self.shared_direction,
            # Lists, not mappings by seed: torch.distributed.checkpoint loads only keys that are there before.
            "path": [] if path is None else [[seed, on_host(row)] for seed, row in path.coefficients.items()],
            "path_decays": [] if path is None else on_host(path.decays),
            "anchor_gradients": [] if path is None else [[seed, float(g)] for seed, g in path.gradients.items()],
            "anchor_ok": path is None or bool(path.ok),
            "dropped": sorted(self._dropped) if holds else [],
            "age": self._age if holds else None,
        }

    def _check_run(self, zo: Any) -> dict[str, Any]:
        run = super()._check_run(zo)
        return run | state.check_svrg(zo, len(self.param_groups), self._n_blocks, run["step_count"])

    def _check_more(self, group: Mapping[str, Any], where: str) -> None:
        if "anchor_lr" not in group:
            raise ValueError(f"{where}anchor_lr: expected a value, got none")
        _checked(group["anchor_lr"], where)

    def _check_kept(self, kept: Mapping[Tensor, tuple[str, Mapping[Any, Any]]], run: dict[str, Any]) -> None:
        anchored = [p for g in self.param_groups[: len(run["path_decays"]) // 2] for p in g["params"]]
        needed = set() if run["age"] is None else {p for p in anchored if p.requires_grad}
        for p, (name, entry) in kept.items():
            if "anchor" in entry:
                state.check_snapshot(f"{name}['anchor']", entry["anchor"], p, same_dtype=p in needed)
                needed.discard(p)
        if needed:
            absent = [self._names[p] for p in anchored if p in needed]
            raise ValueError(
                f"state_dict: state: expected an anchor of {absent[0]}, at age {run['age']}, got none; before loading, "
                "freeze what the run had frozen"
            )

    def _take_state(self, run: dict[str, Any]) -> None:
        self.anchor_every, self.shared_direction = run["anchor_every"], run["shared_direction"]
        self._forget()
        if run["age"] is not None:
            decays, coefficients = run["path_decays"], run["path"]
            self._path = Path(len(decays), decays, coefficients, run["anchor_gradients"], run["anchor_ok"])
        self._dropped, self._age = frozenset(run["dropped"]), run["age"]
        if not self._holds():
            self._forget()
        for kept in self.state.values():  # torch keeps the caller's tensors; a snapshot must be our own
            if "anchor" in kept:
                kept["anchor"] = kept["anchor"].clone().contiguous()
        theta = [] if self._path is None else [(t, t.detach().clone()) for t in map(local, self._trainable())]
        try:
            self._prepare()
        except BaseException:
            with torch.no_grad(), signals_held():
                for t, kept_values in theta:
                    t.copy_(kept_values)
            raise


def _checked(anchor_lr: Any, where: str = "") -> float | None:
    return None if anchor_lr is None else checks.number(f"{where}anchor_lr", anchor_lr, 0.0)
