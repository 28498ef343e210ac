"""What an estimator is asked, and what it answers: a `Step` in, an `Estimate` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..closures.losses import Closure, Pair, check_pair, value_of
from ..closures.watch import Closures
from ..interrupts import Call
from ..perturbation.place import Place, Probes
from ..ranks.parallel import Ranks
from ..trajectory import Kind, Setup
from ..weights.rows import Seed
from ..weights.tables import Weight, Weights
from .draws import Draws
from .numbers import Numbers
from .path import Path


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of some directions.

    Attributes:
        pairs: (L+, L-) of each direction; of all ranks' directions.
        seen: what the closure returned on this rank.
    """

    pairs: list[Pair]
    seen: list[Any]

    def mean(self, several_ranks: bool) -> Tensor | float:
        """Their mean, as a tensor if the closure returns tensors."""
        first = self.seen[0]
        if not several_ranks:
            return sum(self.seen) / len(self.seen)
        mean = sum(value for pair in self.pairs for value in pair) / (2 * len(self.pairs))
        return torch.as_tensor(mean, device=first.device).to(first) if isinstance(first, Tensor) else mean


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has begun. Nothing has moved yet.

    Attributes:
        closures: what the user gave `step()`.
        eps: ε.
        rates, weight_decays: of each row of scales: two rows a parameter group, the second exempt from weight decay.
        place: where losses are evaluated.
        guarded: refuse writes of the closure to weights before they happen, in place.
        ranks: those that take the step together; None if this process is alone.
        agreed: texts "name: value" that must be equal on all ranks.
        note_probes: tells whoever restores the weights after an exception.
        note_writes: tells whoever keeps the record that closures may have written to weights.
    """

    weights: Weights
    closures: tuple[Closure, ...]
    eps: float
    rates: list[float]
    weight_decays: list[float]
    draws: Draws
    place: Place
    watched: Closures
    ranks: Ranks | None
    agreed: list[str]
    note_probes: Callable[[Probes], None]
    note_writes: Callable[[], None]
    guarded: bool = False

    def probes(
        self,
        active: Sequence[int] | None,
        *,
        from_anchor: bool = False,
        restore: Callable[[], None] | None = None,
    ) -> Probes:
        """For evaluations around θ, or around the anchor.

        Args:
            active: indices of the weights that are perturbed; None for all.
            restore: brings θ back exactly, if the estimator can do so; otherwise the pass back rounds.
        """
        made = self.place.probes(
            active,
            step=self.draws.step,
            guarded=self.guarded,
            seed=self.draws.seed,
            from_anchor=from_anchor,
            restore=restore,
        )
        self.note_probes(made)
        return made

    def losses(self, probes: Probes, closure: Closure, seeds: Sequence[Seed]) -> Losses:
        """L(θ + ε z) and L(θ - ε z) of each direction. Ranks share the work, and know all of the losses afterwards."""
        closure, found = self.watched.looked_at(closure, self.eps), Losses([], [])
        if self.ranks is None:
            evaluate(probes, closure, seeds, self.eps, found)
            self.note_writes()
            return found
        own, known = self.ranks.own(seeds), (self.draws.step, self.agreed, self.weights.shards)
        try:
            evaluate(probes, closure, own, self.eps, found)
            self.note_writes()
        except Exception as error:
            # Take the moves that are left: weights that went another way would be rounded otherwise than the others'.
            for seed, signed in [(s, e) for s in own for e in (self.eps, -self.eps)][probes.moves :]:
                probes.to({seed: signed})
            self.ranks.report_error(error, len(own), *known)
            raise
        return Losses(self.ranks.exchange(found.pairs, *known), found.seen)


def evaluate(probes: Probes, closure: Closure, seeds: Sequence[Seed], eps: float, into: Losses) -> None:
    """Add to `into` the losses at θ + ε z and θ - ε z of each direction."""
    for seed in seeds:
        values = []
        for signed in (eps, -eps):
            probes.to({seed: signed})
            loss, value = value_of(probes.evaluate(closure))
            into.seen.append(loss)
            values.append(value)
        pair = (values[0], values[1])
        check_pair(pair, eps)
        into.pairs.append(pair)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimator made of the losses of a step.

    Attributes:
        kind: of the record.
        losses: those at θ.
        numbers: projected gradients, learning rates and decays; whether the step is refused.
        update: writes the new θ, and makes the calls that it is given together with the pass that does so.
        rates: the learning rates to record, one a row.
        anchor_pairs: losses at the anchor.
    """

    kind: Kind
    losses: Losses
    numbers: Numbers
    update: Callable[[Sequence[Call]], None]
    rates: Sequence[float]
    anchor_pairs: Sequence[Pair] = ()


class Estimator:
    """Which losses a step asks for, and what numbers they give. `TwoSided` is the simplest one.

    An estimator that remembers something between steps (MeZO-SVRG's anchor) also answers the questions below, which the
    optimizer asks when weights change, ranks compare, or a run is saved and resumed.

    Attributes:
        group_options: options of a parameter group that it has besides the usual ones.
        keeps_theta: whether it can write θ anew, whatever the weights are now.
        why_steps_differ: why its steps do not all launch the same kernels; None if they do.
    """

    group_options: tuple[str, ...] = ()
    keeps_theta = False
    why_steps_differ: str | None = None

    def estimate(self, step: Step) -> Estimate:
        """Evaluate the losses of a step. θ is the same afterwards, or is where `Estimate.update` starts from."""
        raise NotImplementedError

    def check_options(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Before a step, and before anything is prepared for it: check and note its options in the groups.

        Raises:
            TypeError, ValueError: an option cannot be.
        """

    def begin(self, changed: bool) -> None:
        """Before a step. `changed`: something else than the optimizer changed weights."""

    def fill_group(self, group: dict[str, Any]) -> None:
        """Give a new parameter group the options that it lacks, and check them."""

    def forget(self) -> None:
        """Other memory is trained from now on, or under other names."""

    def anchors(self, weights: Sequence[Weight], kept: Mapping[Tensor, dict[str, Any]]) -> Sequence[Tensor] | None:
        """For each weight a snapshot that passes start from; None if there are none.

        Args:
            kept: `torch.optim.Optimizer.state`, where snapshots are kept.
        """
        return None

    def rebuilt(self, weights: Weights, changed: bool) -> bool:
        """Whether θ was written, since new tables were made and the weights were not `changed` by others."""
        return False

    def write(self, weights: Weights) -> None:
        """Write θ anew, if it `keeps_theta`."""
        raise NotImplementedError

    def setup_fields(self) -> dict[str, bool]:
        """The fields of a trajectory's setup that depend on the estimator."""
        return {"svrg": False, "shared_direction": False, "anchored": False}

    def agreed(self, groups: Sequence[Mapping[str, Any]]) -> list[str]:
        """Texts "name: value" of what may change between steps, and must be equal on all ranks."""
        return []

    def options(self) -> list[str]:
        """Texts "name: value" of its options, which must be equal on all ranks."""
        return []

    def state(self, groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
        """What `state_dict()` saves of it, beside `kept`."""
        return {}

    def check_state(self, zo: Mapping[str, Any], groups: int, blocks: int, steps: int) -> dict[str, Any]:
        """The same of a state that is loaded, checked.

        Raises:
            TypeError, ValueError: a value cannot be.
        """
        return {}

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Check the options of a parameter group in a state that is loaded."""

    def check_kept(
        self,
        kept: Mapping[Tensor, tuple[str, Mapping[Any, Any]]],
        run: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Tensor, str],
    ) -> None:
        """Check what a state keeps of each parameter: for each what to call it, and the entry."""

    def take_state(
        self,
        run: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        kept: Mapping[Tensor, dict[str, Any]],
    ) -> bool:
        """Take what was checked. Whether θ must be written from it before the next step."""
        return False

    def go_on_from(
        self, end: ReplayedEnd, setup: Setup, trained: set[str], kept: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        """Go on where a replayed run ended; `trained` are the names of what is trained now."""


@dataclass(frozen=True, slots=True)
class ReplayedEnd:
    """Where a replay arrived: of MeZO-SVRG the path from its anchor, the anchors, the age, the dropped blocks.

    Attributes:
        begun: whether a step was taken after the last setup.
    """

    path: Path | None
    dropped: frozenset[int]
    age: int | None
    anchors: Sequence[tuple[Tensor, Tensor]]
    begun: bool
