"""The estimator of MeZO-SVRG (Gautam et al., arXiv 2404.08080): SPSA corrected by an estimate at an anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..interrupts import Call
from ..trajectory import TWO_SIDED, Kind, Setup
from ..warn import warn
from ..weights.rows import decay_factors, on_host
from ..weights.shards import is_sharded, like, local
from ..weights.tables import Weight, Weights
from .draws import ANCHOR_SLOT, SEPARATE_SLOT
from .numbers import Numbers
from .path import Path
from .protocol import Estimate, Estimator, ReplayedEnd, Step
from .svrg_schedule import Schedule
from .svrg_state import check_snapshot, check_svrg

ANCHOR = "anchor"  # key of a parameter's snapshot in the optimizer's state


class SVRG(Estimator):
    """Takes an anchor in every `anchor_every`-th step, and corrects the estimates of the steps between by it.

    `zo_kernels.MeZOSVRG` has the equations. Between anchors θ is kept as the anchor plus a sum of directions (`Path`).

    Attributes:
        anchor_lr, anchor_every, shared_direction, anneal, anneal_above, annealed: see `MeZOSVRG`.
        schedule: divides the rates when the loss rises.
    """

    group_options = ("anchor_lr",)
    name = "svrg"
    can_rewrite_theta = True
    why_steps_differ = "MeZO-SVRG's steps at an anchor and between anchors are not alike"

    def __init__(
        self, anchor_lr: float | None, anchor_every: int, shared_direction: bool, anneal: float | None, above: float
    ):
        self.anchor_every = checks.integer("anchor_every", anchor_every, 1)
        self.anchor_lr = _checked(anchor_lr)
        if not isinstance(shared_direction, bool):
            raise TypeError(f"shared_direction: expected a bool, got {type(shared_direction).__name__}")
        self.shared_direction = shared_direction
        self.schedule = Schedule.of(anneal, above)
        self._anchor_rates: list[float | None] = []  # of each row, as the step that is being taken found them
        self.forget()

    @property
    def anneal(self) -> float | None:
        return self.schedule.anneal

    @property
    def anneal_above(self) -> float:
        return self.schedule.above

    @property
    def annealed(self) -> int:
        return self.schedule.annealed

    def forget(self) -> None:
        """Forget the anchor: the next step takes another."""
        self._age: int | None = None  # steps since the anchor; set first: without an age nothing else is used
        self._path: Path | None = None
        self._dropped: frozenset[int] = frozenset()

    def fill_group(self, group: dict[str, Any]) -> None:
        _checked(group.setdefault("anchor_lr", self.anchor_lr))

    def check_options(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._anchor_rates = [_checked(group["anchor_lr"]) for group in groups for _ in range(2)]

    def begin(self, changed: bool) -> None:
        if self._age is None or self._age >= self.anchor_every or changed:
            self.forget()

    def estimate(self, step: Step) -> Estimate:
        return self._at_anchor(step) if self._age is None else self._between(step)

    def _at_anchor(self, step: Step) -> Estimate:
        """θ̄ <- θ, g = estimate(full, θ̄), θ <- decay θ - anchor_lr g."""
        weights, (_, full_closure), seeds = step.weights, step.closures, step.draws.seeds(ANCHOR_SLOT)
        assert weights.anchors is not None
        for w, anchor in zip(weights.weights, weights.anchors, strict=True):
            anchor.copy_(w.tensor)
        self._dropped = step.draws.dropped()
        self._path = Path(weights.rows)
        losses = step.losses(self._probes(step, from_anchor=True), full_closure, seeds)
        given = zip(step.rates, self._anchor_rates, strict=True)
        schedule = self.schedule.at_anchor(losses.pairs)  # which counts from this step on
        rates = schedule.divided([2 * lr if anchor_lr is None else anchor_lr for lr, anchor_lr in given])
        decays = decay_factors(rates, step.weight_decays)
        numbers = Numbers.of([losses.pairs], TWO_SIDED.span(step.eps), rates, decays, reach=weights.reach)
        path, schedule = Path.started(weights.rows, seeds, numbers), self.schedule.if_taken(schedule, numbers.ok)
        update = partial(self._advance, weights, path, 1, schedule, True)
        return Estimate(Kind.ANCHOR, losses, numbers, update, rates)

    def _between(self, step: Step) -> Estimate:
        """θ <- decay θ - lr [estimate(I, θ) - estimate(I, θ̄) + g]."""
        path, age = self._path, self._age
        assert path is not None and age is not None
        (closure, _), seeds = step.closures, step.draws.seeds()
        anchor_seeds = seeds if self.shared_direction else step.draws.seeds(SEPARATE_SLOT)
        here = step.losses(self._probes(step), closure, seeds)
        there = step.losses(self._probes(step, from_anchor=True), closure, anchor_seeds)
        rates = self.schedule.divided(step.rates)
        decays, others = decay_factors(rates, step.weight_decays), list(path.gradients.values())
        pairs, reach, span = [here.pairs, there.pairs], step.weights.reach, TWO_SIDED.span(step.eps)
        numbers = Numbers.of(pairs, span, rates, decays, path.ok, reach=reach, others=others)
        estimate = path.estimate(seeds, numbers.gradients[0], anchor_seeds, numbers.gradients[1])
        update = partial(self._advance, step.weights, path.advanced(estimate, numbers), age + 1, self.schedule, False)
        return Estimate(Kind.BETWEEN, here, numbers, update, rates, there.pairs)

    def _probes(self, step: Step, *, from_anchor: bool = False) -> Any:
        active = step.weights.active(self._dropped)
        return step.probes(active, from_anchor=from_anchor, restore=partial(self.rewrite_theta, step.weights))

    def _advance(
        self, weights: Weights, path: Path, age: int, schedule: Schedule, record: bool, then: Sequence[Call]
    ) -> None:
        """Write the θ of a new path; the path replaces the old one together with the pass that writes it."""
        new = {"_path": path, "_age": age, "schedule": schedule}
        noted = [partial(setattr, self, name, value) for name, value in new.items()]
        path.write(weights, weights.active(self._dropped), record=record, then=[*noted, *then])

    def rewrite_theta(self, weights: Weights) -> None:
        """Write θ from the anchor and the path. Dropped blocks are not written: they are at the anchor."""
        assert self._path is not None
        self._path.write(weights, weights.active(self._dropped))

    def anchors(self, weights: Sequence[Weight], kept: Mapping[Tensor, dict[str, Any]]) -> Sequence[Tensor]:
        for p in kept.keys() - {w.parameter for w in weights}:
            kept[p].pop(ANCHOR, None)  # the parameter is frozen now
        found = []
        for w in weights:
            anchor = kept[w.parameter].get(ANCHOR)
            if anchor is None or anchor.shape != w.parameter.shape or anchor.dtype != w.parameter.dtype:
                kept[w.parameter][ANCHOR] = w.parameter.detach().clone()
                self.forget()
            elif not is_sharded(anchor) and anchor.stride() != w.parameter.stride():
                # In the forward, modules run on copies of the anchor: give it the parameter's strides.
                kept[w.parameter][ANCHOR] = w.parameter.detach().clone().copy_(anchor)
            found.append(local(kept[w.parameter][ANCHOR]))
        return found

    def after_rebuild(self, weights: Weights, changed: bool) -> bool:
        if self._age is None or changed:
            return False
        # The tables are new, and the anchor is not: there may be more groups, and the new tables have no masks yet.
        assert self._path is not None and weights.anchors is not None
        self._path.extend(weights.rows)
        with torch.no_grad():
            for w, anchor in zip(weights.weights, weights.anchors, strict=True):
                if w.block in self._dropped:
                    w.tensor.copy_(anchor)
            self._path.write(weights, weights.active(self._dropped), record=True)
        return True

    def setup_fields(self) -> dict[str, Any]:
        own = {"svrg": True, "shared_direction": self.shared_direction, "anchored": self._age is not None}
        return {**own, "anneal": self.schedule.numbers}

    def agreed(self, groups: Sequence[Mapping[str, Any]]) -> list[str]:
        age = "none" if self._age is None else self._age
        return [
            f"anchor_lr: {[group['anchor_lr'] for group in groups]}",
            f"steps since the anchor: {age}",
            *self.schedule.agreed(),
        ]

    def options(self) -> list[str]:
        own = [f"anchor_every: {self.anchor_every}", f"shared_direction: {self.shared_direction}"]
        return [*own, *self.schedule.options()]

    def _anchor_is_valid(self, groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Say whether the anchor belongs to the weights that are trained now; groups added since have none yet."""
        if self._age is None or self._path is None:
            return False
        trained = {p for g in groups[: self._path.rows // 2] for p in g["params"] if p.requires_grad}
        return trained == {p for p, entry in kept.items() if ANCHOR in entry}

    def state(self, groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
        valid = self._anchor_is_valid(groups, kept)  # if not, the next step takes another anchor
        path = self._path if valid else None
        return {
            "anchor_every": self.anchor_every,
            "shared_direction": self.shared_direction,
            # Lists, not mappings by seed: torch.distributed.checkpoint loads only keys that exist before.
            "path": [] if path is None else [[seed, on_host(row)] for seed, row in path.coefficients.items()],
            "path_decays": [] if path is None else on_host(path.decays),
            "anchor_gradients": [] if path is None else [[seed, float(g)] for seed, g in path.gradients.items()],
            "anchor_ok": path is None or bool(path.ok),
            "dropped": sorted(self._dropped) if valid else [],
            "age": self._age if valid else None,
            **self.schedule.state(),
        }

    def check_state(self, zo: Mapping[str, Any], groups: int, blocks: int, steps: int) -> dict[str, Any]:
        return {**check_svrg(zo, groups, blocks, steps), "schedule": self.schedule.in_state(zo, steps)}

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        if "anchor_lr" not in group:
            raise ValueError(f"{where}anchor_lr: expected a value, got none")
        _checked(group["anchor_lr"], where)

    def check_kept(
        self,
        kept: Mapping[Tensor, tuple[str, Mapping[Any, Any]]],
        run: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Tensor, str],
    ) -> None:
        anchored = [p for g in groups[: len(run["path_decays"]) // 2] for p in g["params"]]
        needed = set() if run["age"] is None else {p for p in anchored if p.requires_grad}
        for p, (name, entry) in kept.items():
            if ANCHOR in entry:
                check_snapshot(f"{name}['{ANCHOR}']", entry[ANCHOR], p, same_dtype=p in needed)
                needed.discard(p)
        if needed:
            absent = [names[p] for p in anchored if p in needed]
            raise ValueError(
                f"state_dict: state: expected an anchor of {absent[0]}, at age {run['age']}, got none; before loading, "
                "freeze what the run had frozen"
            )

    def load_state(
        self, run: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        self.anchor_every, self.shared_direction = run["anchor_every"], run["shared_direction"]
        self.schedule = run["schedule"]
        self.forget()
        if run["age"] is not None:
            decays, coefficients = run["path_decays"], run["path"]
            self._path = Path(len(decays), decays, coefficients, run["anchor_gradients"], run["anchor_ok"])
        self._dropped, self._age = frozenset(run["dropped"]), run["age"]
        if not self._anchor_is_valid(groups, kept):
            self.forget()
        for entry in kept.values():  # torch keeps the tensors of the state; passes need one that nobody else writes to
            if ANCHOR in entry:
                entry[ANCHOR] = entry[ANCHOR].clone().contiguous()
        return self._path is not None

    def continue_from(
        self, end: ReplayedEnd, setup: Setup, trained: set[str], kept: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        self._path, self._dropped, self._age = end.path, end.dropped, end.age
        if not (end.begun or setup.anchored) or {w.name for w in setup.weights} != trained:
            self.forget()  # the anchor belongs to other weights, or the run had forgotten it
        for p, anchor in end.anchors:
            kept[p][ANCHOR] = like(p, anchor)
        self.shared_direction = setup.shared_direction
        schedule = Schedule.of_setup(setup.anneal)
        if (own := self.schedule.options()) != (of_run := schedule.options()):
            warn(f"resume: the run had {', '.join(of_run)} (not {', '.join(own)}); the run's are taken")
        for loss in end.anchor_losses:  # since that setup
            schedule = schedule.after(loss)
        self.schedule = schedule


def _checked(anchor_lr: Any, where: str = "") -> float | None:
    return None if anchor_lr is None else checks.number(f"{where}anchor_lr", anchor_lr, 0.0)
