"""Rebuilding the weights of a run's steps from its trajectory, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, names, spec
from ..backends.types import Pass
from ..estimators.draws import ANCHOR_SLOT, FIRST_SLOT, SEPARATE_SLOT, Draws
from ..estimators.normalize import Normalizer
from ..estimators.numbers import Numbers, spsa_update
from ..estimators.path import Path
from ..estimators.protocol import offsets
from ..interrupts import Call, at_once
from ..perturbation.in_place import Walk
from ..trajectory import TWO_SIDED, Kind, Record, Setup, Trajectory
from ..trajectory.difference import DIFFERENCES
from ..trajectory.fingerprint import as_text
from ..trajectory.record import TAKEN
from ..weights.fingerprints import combined_fingerprint, fingerprints
from ..weights.kept import MASK, bits_of_run
from ..weights.rows import decay_factors
from ..weights.shards import local, shard_of
from ..weights.tables import Weight, Weights

# A replay that fails in the middle cannot undo its steps: a copy of the first weights would take as much memory again.
_NOW = "; the parameters now hold what came of the replay: load the first ones again"
# Of one merged pass. With signs, most of a pass is reading and writing the weights, so more directions share it: 64
# steps in place, which have three of one seed each.
_MOST_DIRECTIONS = {"normal": 64, "rademacher": 3 * 64}


@torch.no_grad()
def replay(
    params: nn.Module | Iterable[Any],
    trajectory: Trajectory | str | FilePath,
    upto: int | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Rebuild the weights that a run had after a step, bit for bit, from the weights that it started with.

    No forward runs. A step is one fused pass. If the run perturbed in place, each perturbation is a pass too, since it
    left its rounding in the weights. Passes over float32 weights whose masks stay are merged, several steps at a time,
    which changes no bit. Backend, device and number of threads may differ from the run's.

    Args:
        params: what the optimizer was given: the module, or parameters, named parameters, groups; with the weights
            that the run started with. Changed in place.
        trajectory: `opt.trajectory`, or the file it was saved to.
        upto: the number of steps (as `opt.step_count` counts them) after which to stop; None for all.
        backend: see `add_noise_`.

    Raises:
        TypeError, ValueError: the trajectory is damaged or of another version; `upto` is not in it; the parameters have
            other names, shapes or dtypes than the run's, or other values than those it started with; between two steps
            of the run something other than the optimizer changed the weights. The message says which. Nothing has been
            changed, unless the run did not notice such a change: then the replay finds it at a later fingerprint.
    """
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.load(trajectory)
    Replay(names_of(params), trajectory, backend).run(upto)


def names_of(params: nn.Module | Iterable[Any]) -> dict[Tensor, str]:
    """Return the name of each parameter of what an optimizer takes."""
    if isinstance(params, nn.Module):
        return names.of_module(params)
    every: dict[Tensor, str] = {}
    for group in torch.optim.SGD(params, lr=0.0).param_groups:
        names.add_group(every, group)
    return every


class Replay:
    """Rebuilds a run, step by step.

    Args:
        named: the parameters and their names.
        trajectory: of the run.
        backend: see `add_noise_`.
        check_values: whether the parameters must hold the values that the run started with. Names, shapes and dtypes
            are always checked.

    Attributes:
        weights: the tables in use; None before the first step.
        masks: the bits of each weight's mask, by name, if the run keeps its masks.
        normalizer: for the next step.
        path, dropped, age, anchor_losses: what MeZO-SVRG remembers after the last rebuilt step: see
            `protocol.ReplayedEnd`.

    Raises:
        ValueError: parameters and trajectory do not fit together; nothing has been changed.
    """

    def __init__(
        self,
        named: Mapping[Tensor, str],
        trajectory: Trajectory,
        backend: str | None = None,
        *,
        check_values: bool = True,
    ):
        self.trajectory, self._backend = trajectory, backend
        self._tensors = {name: p for p, name in names.bare(named).items()}
        self.weights: Weights | None = None
        self.normalizer = Normalizer()
        self.masks: dict[str, Tensor] = {}
        self.path: Path | None = None
        self.dropped: frozenset[int] = frozenset()
        self.age: int | None = None
        self.anchor_losses: list[float] = []
        self._stale = False  # whether θ must still be written from the path
        for _, setup in trajectory.setups:
            if setup.noise != spec.VERSION:
                raise ValueError(f"trajectory: expected noise {spec.VERSION}, got {setup.noise}")
            self._check_shapes(setup)
        start = [setup for before, setup in trajectory.setups if before == 0]
        if start and check_values:
            if start[-1].anchored:
                raise ValueError(
                    "trajectory: it begins between two anchors of MeZO-SVRG, with a state that was loaded, and does "
                    "not have the anchor"
                )
            masked = any(w.threshold is not None for w in start[-1].weights)
            if start[-1].step and start[-1].mask == "kept" and masked:
                raise ValueError(
                    f"trajectory: it begins after step {start[-1].step}, with a state that was loaded, and does not "
                    "have the masks, which are those of the run's first step"
                )
            self._check_values(start[-1])

    def _check_shapes(self, setup: Setup) -> None:
        for w in setup.weights:
            t = self._tensors.get(w.name)
            if t is None:
                raise ValueError(f"{w.name}: expected a parameter of this name, as in the trajectory, got none")
            shape, dtype = tuple(t.shape), str(t.dtype).removeprefix("torch.")
            if (shape, dtype) != (w.shape, w.dtype):
                wanted = f"{w.dtype} of shape {w.shape}, as in the trajectory"
                raise ValueError(f"{w.name}: expected {wanted}, got {dtype} of {shape}")
            if not names.may_have(w.name, w.param_id):
                raise ValueError(f"{w.name}: expected the id of this name in the trajectory, got {w.param_id}")
            checks.weight(w.name, local(t))

    def _check_values(self, setup: Setup) -> None:
        found = fingerprints([shard_of(w.name, self._tensors[w.name]) for w in setup.weights])
        wrong = [w.name for w, value in zip(setup.weights, found, strict=True) if value != w.fingerprint]
        if not wrong:
            return
        some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        what = "the run started with" if self.weights is None else f"the run had after step {setup.step}"
        now = "; the trajectory has none: load those that it began with" if self.weights is None else _NOW
        raise ValueError(f"params: expected the weights that {what}, got other values in {some}{now}")

    def run(self, upto: int | None = None) -> None:
        """Rebuild all steps, or those before the step count `upto`.

        Raises:
            TypeError, ValueError: see `replay`.
        """
        trajectory = self.trajectory
        if not trajectory.setups:
            if upto:
                raise ValueError(f"upto: expected a step count in the trajectory, which has no steps, got {upto}")
            return
        first = trajectory.setups[0][1].step
        if upto is not None:
            checks.integer("upto", upto, first, trajectory.steps)
        end = len(trajectory) if upto is None else trajectory.until(upto)
        for before, setup in trajectory.setups:
            if before < end and not setup.continues:
                raise ValueError(
                    f"trajectory: something other than the optimizer changed the weights after step {setup.step} (or a "
                    f"state was loaded); it can be replayed with upto={setup.step}"
                )
        setups = dict(trajectory.setups)  # of two setups before the same step, the later one is valid
        with torch.no_grad():
            for i in range(end):
                if i in setups:
                    self._begin(setups[i])
                self._take(trajectory[i])
                if (expected := trajectory.checks.get(i + 1)) is not None:
                    self._check(expected, trajectory[i].step + 1)
            self._flush()

    def _check(self, expected: str, step: int) -> None:
        self._flush()
        if self.weights is None:
            raise _does_not_fit("a fingerprint of the weights comes before any step")
        if as_text(int(combined_fingerprint(self.weights.shards))) != expected:
            raise ValueError(
                f"trajectory: replaying it to step {step} gives other weights than the run had: something other than "
                f"the optimizer changed them on the way, unnoticed, or a machine computed wrong{_NOW}"
            )

    def _begin(self, setup: Setup) -> None:
        self._flush()
        if self.weights is not None:
            self._check_values(setup)
        self._setup, self.normalizer = setup, Normalizer.of_setup(setup.normalize, setup.rms)
        self.anchor_losses = []
        tensors = [local(self._tensors[w.name]) for w in setup.weights]
        known = self.weights
        anchors = None
        if setup.anchored:
            if known is None or known.anchors is None or self.path is None:
                raise _does_not_fit(f"the setup at step {setup.step} needs an anchor, and none was taken before")
            kept = {w.name: anchor for w, anchor in zip(known.weights, known.anchors, strict=True)}
            if missing := [w.name for w in setup.weights if w.name not in kept]:
                raise _does_not_fit(f"the setup at step {setup.step} needs an anchor of {missing[0]}, which has none")
            anchors = [kept[w.name] for w in setup.weights]
            self.path.extend(2 * len(setup.weight_decays))
        else:
            self._forget()
            if setup.svrg:
                anchors = [t.detach().clone() for t in tensors]
        self.weights = self._tables(setup, anchors)
        self._queue = _Queue(self.weights)

    def _tables(self, setup: Setup, anchors: Sequence[Tensor] | None) -> Weights:
        weights = []
        for w in setup.weights:
            p = self._tensors[w.name]
            weights.append(Weight(w.name, p, shard_of(w.name, p), w.param_id, w.row, w.block, w.threshold))
        masks = None
        if setup.mask == "kept":
            kept = {w.parameter: {MASK: self.masks.get(w.name)} for w in weights}
            masks = bits_of_run(weights, kept, begun=True)
            self.masks |= {w.name: bits for w, bits in zip(weights, masks, strict=True) if bits is not None}
        rows, how = 2 * len(setup.weight_decays), (setup.stochastic, setup.distribution)
        return Weights(weights, rows, *how, anchors, setup.in_place, self._backend, masks=masks)

    def _forget(self) -> None:
        self.path, self.dropped, self.age = None, frozenset(), None

    def _take(self, record: Record) -> None:
        setup, weights = self._setup, self.weights
        if weights is None:
            raise _does_not_fit("a step comes before any setup")
        rates = [rate for rate in record.rates for _ in range(2)]
        rows = [w for decay in setup.weight_decays for w in (decay, 0.0)]
        match record.kind:
            case Kind.STEP | Kind.ONE_SIDED | Kind.REFUSED | Kind.INTERRUPTED:
                if not setup.svrg:  # MeZO-SVRG restores the weights exactly, so there is nothing to replay
                    self._spsa(record, weights, rates, rows)
            case Kind.ANCHOR:
                self._flush()
                if weights.anchors is None:
                    raise _does_not_fit(f"step {record.step} is at an anchor, of a run without anchors")
                for w, anchor in zip(weights.weights, weights.anchors, strict=True):
                    anchor.copy_(w.tensor)
                self.dropped = self._draws(record).dropped()
                n = Numbers.of([record.losses], TWO_SIDED.span(record.eps), rates, decay_factors(rates, rows))
                self.path, self.age = Path.started(weights.rows, self._seeds(record, ANCHOR_SLOT), n), 1
                self.anchor_losses += [record.loss] if n.ok and record.loss is not None else []
                self._stale = True
            case Kind.BETWEEN:
                if self.path is None or self.age is None:
                    raise _does_not_fit(f"step {record.step} is between anchors, and none was taken before")
                seeds = self._seeds(record)
                anchor_seeds = seeds if setup.shared_direction else self._seeds(record, SEPARATE_SLOT)
                losses = [record.losses, record.anchor_losses]
                n = Numbers.of(losses, TWO_SIDED.span(record.eps), rates, decay_factors(rates, rows), self.path.ok)
                estimate = self.path.estimate(seeds, n.gradients[0], anchor_seeds, n.gradients[1])
                self.path = self.path.advanced(estimate, n)
                self.age += 1
                self._stale = True

    def _draws(self, record: Record) -> Draws:
        setup = self._setup
        return Draws(setup.seed, record.step, setup.directions, setup.drop, setup.blocks)

    def _seeds(self, record: Record, slot: int = FIRST_SLOT) -> list[int]:
        return self._draws(record).seeds(slot)

    def _spsa(self, record: Record, weights: Weights, rates: Sequence[float], weight_decays: Sequence[float]) -> None:
        setup, difference = self._setup, DIFFERENCES[self._setup.estimator]
        active, seeds = weights.active(self._draws(record).dropped()), self._seeds(record)
        taken = record.kind in TAKEN
        walk = Walk(self._queue, active)
        if setup.in_place:
            moves = offsets(seeds, setup.eps, difference)
            for offset in moves if taken else moves[: record.probes]:
                walk.to(offset)
            if not taken:
                walk.to({})
        if taken:
            span, decays = difference.span(record.eps), decay_factors(rates, weight_decays)
            n = Numbers.of([record.losses], span, rates, decays, normalizer=self.normalizer)
            self.normalizer = n.normalizer
            walk.finish(spsa_update(seeds, n.along, n.rates), n.decays)

    def _flush(self) -> None:
        if self.weights is None:
            return
        self._queue.flush()
        if self._stale and self.path is not None:
            self.path.write(self.weights, self.weights.active(self.dropped))
            self._stale = False


def _does_not_fit(what: str) -> ValueError:
    return ValueError(f"trajectory: its records do not fit together: {what}")


class _Queue:
    """Merges passes over weights where that changes no bit.

    Passes over the same float32 weights with the same masks, of which only the first has a decay, are one chain of
    fused multiply-adds (docs/noise.md, 4). All passes of a queue have the distribution of its weights.
    """

    def __init__(self, weights: Weights):
        self._weights = weights
        may_chain = weights.masks_stay
        self._chains = all(
            w.tensor.dtype == torch.float32 and (may_chain or w.threshold is None) for w in weights.weights
        )
        self._waiting: list[Pass] = []
        self._directions, self._most = 0, _MOST_DIRECTIONS[weights.distribution]
        self.describe = weights.describe

    def run(self, do: Pass, *, record: bool = False, then: Sequence[Call] = ()) -> None:
        """Make a pass, now or merged with later ones. The calls of `then` are made now in any case."""
        if not self._chains:
            self._weights.run(do, record=record, then=then)
            return
        at_once(then)
        if self._waiting and not self._continues(do):
            self.flush()
        self._waiting.append(do)
        self._directions += len(do.seeds)

    def _continues(self, do: Pass) -> bool:
        """Say whether a pass can be merged with those that are waiting."""
        fits = self._directions + len(do.seeds) <= self._most
        return fits and self._waiting[0].active == do.active and all(d == 1.0 for d in do.decays)

    def flush(self) -> None:
        """Make the passes that are waiting."""
        if not self._waiting:
            return
        waiting, self._waiting, self._directions = self._waiting, [], 0
        seeds: Any = [seed for do in waiting for seed in do.seeds]
        scales = [[scale for row in rows for scale in row] for rows in zip(*(do.scales for do in waiting), strict=True)]
        self._weights.run(replace(waiting[0], seeds=seeds, scales=scales))
