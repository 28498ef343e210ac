"""The protocol of an estimator: it takes a `Step`, evaluates losses, and returns an `Estimate`."""

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
from ..trajectory import TWO_SIDED, Difference, Kind, Setup
from ..weights.rows import Seed, Value
from ..weights.tables import Weight, Weights
from .draws import Draws
from .normalize import Normalizer
from .numbers import Numbers
from .path import Path


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses along some directions.

    Attributes:
        pairs: the two losses of each direction, also of those that other ranks evaluated.
        seen: what the closure returned on this rank, in order.
        difference: which two losses.
    """

    pairs: list[Pair]
    seen: list[Any]
    difference: Difference = TWO_SIDED

    def mean(self, several_ranks: bool) -> Tensor | float:
        """Return the mean loss, or that at θ if there is one, as a tensor if the closure returns tensors."""
        first, one_sided = self.seen[0], self.difference.one_sided
        if not several_ranks:
            return first if one_sided else sum(self.seen) / len(self.seen)
        values = [value for pair in self.pairs for value in (pair[1:] if one_sided else pair)]
        mean = sum(values) / len(values)
        return torch.as_tensor(mean, device=first.device).to(first) if isinstance(first, Tensor) else mean


@dataclass(frozen=True, slots=True)
class Step:
    """All that an estimator needs for one step. Nothing has moved when it gets this.

    Attributes:
        weights: the tables of the trained weights.
        closures: what the user gave `step()`.
        eps: ε.
        rates, weight_decays: of each row of a pass: each parameter group has two rows, the second without weight decay.
        draws: the step's seeds and dropped blocks.
        place: where losses are evaluated.
        watch: checks what closures do and return.
        ranks: the ranks that take the step together; None if this process takes it alone.
        agreed: texts "name: value" that must be equal on all ranks.
        note_probes: stores the probes for whoever restores the weights after an exception.
        note_writes: checks whether closures wrote to weights, which ends the trajectory.
        guarded: in place, stop a closure's write to weights before it happens.
    """

    weights: Weights
    closures: tuple[Closure, ...]
    eps: float
    rates: list[float]
    weight_decays: list[float]
    draws: Draws
    place: Place
    watch: Closures
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
        """Make probes: they evaluate losses around θ, or around the anchor.

        Args:
            active: indices of the weights that are perturbed; None for all.
            from_anchor: perturb the anchor instead of θ.
            restore: restores θ exactly, if the estimator can; without it a pass moves the weights back, and rounds.
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

    def losses(
        self, probes: Probes, closure: Closure, seeds: Sequence[Seed], difference: Difference = TWO_SIDED
    ) -> Losses:
        """Evaluate the two losses of each direction. Ranks share the work, and each gets all losses."""
        closure, found = self.watch.wrap(closure, self.eps, difference), Losses([], [], difference)
        if self.ranks is None:
            evaluate(probes, closure, seeds, self.eps, found)
            self.note_writes()
            return found
        own, to_compare = self.ranks.own(seeds), (self.draws.step, self.agreed, self.weights.shards)
        try:
            evaluate(probes, closure, own, self.eps, found)
            self.note_writes()
        except Exception as error:
            # Make the remaining moves: otherwise this rank's weights would be rounded differently from the others'.
            for offset in offsets(own, self.eps, difference)[probes.moves :]:
                probes.to(offset)
            self.ranks.report_error(error, len(own), *to_compare)
            raise
        return Losses(self.ranks.exchange(found.pairs, *to_compare), found.seen, difference)


def offsets(seeds: Sequence[Seed], eps: float, difference: Difference) -> list[dict[Seed, float]]:
    """Return where a step moves the weights: to θ + ε z of each direction, and to θ - ε z if it is two-sided."""
    return [{seed: signed} for seed in seeds for signed in ((eps,) if difference.one_sided else (eps, -eps))]


def evaluate(probes: Probes, closure: Closure, seeds: Sequence[Seed], eps: float, into: Losses) -> None:
    """Evaluate the two losses of each direction, and append them to `into`. A loss at θ comes first."""

    def at(offset: Mapping[Seed, float]) -> Value:
        probes.to(offset)
        loss, value = value_of(probes.evaluate(closure))
        into.seen.append(loss)
        return value

    one_sided, span = into.difference.one_sided, into.difference.span(eps)
    here = at({}) if one_sided else 0.0
    for seed in seeds:
        pair = at({seed: eps}), here if one_sided else at({seed: -eps})
        check_pair(pair, span)
        into.pairs.append(pair)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The result of an estimator: the losses of a step, the numbers computed from them, and the update.

    Attributes:
        kind: the kind of the step's record.
        losses: the losses at θ.
        numbers: projected gradients, learning rates and decays, and whether the step is skipped.
        update: writes the new θ. It takes C functions to call together with the pass that writes it.
        rates: the learning rate of each row, for the record.
        anchor_pairs: (L+, L-) of each direction at the anchor.
    """

    kind: Kind
    losses: Losses
    numbers: Numbers
    update: Callable[[Sequence[Call]], None]
    rates: Sequence[float]
    anchor_pairs: Sequence[Pair] = ()


class Estimator:
    """Decides which losses a step evaluates, and computes the update from them. `SPSA` is the simplest one.

    A new estimator must write `estimate`. A replay computes updates from recorded losses, so `runs/replay.py` must
    learn the new update; until then the optimizer warns, and a replay refuses the run. All other methods have defaults,
    for one that remembers nothing between steps. One that does (MeZO-SVRG remembers its anchor) overrides them:

    - `fill_group`, `check_options`: its options in parameter groups
    - `begin`, `forget`, `anchors`, `after_rebuild`, `rewrite_theta`: weights that change, and what it keeps of them
    - `setup_fields`, `check_setup`, `agreed`, `options`: what a trajectory records and ranks compare
    - `state`, `check_state`, `check_group`, `check_kept`, `load_state`, `continue_from`: saving and resuming

    Attributes:
        name: what `optimizer.estimator` is.
        normalize: what `optimizer.normalize` is.
        group_options: its options in a parameter group, besides those of every optimizer.
        can_rewrite_theta: whether `rewrite_theta` can restore θ, whatever the weights are now.
        why_steps_differ: why its steps launch different kernels; None if all launch the same ones.
    """

    name: str = "its own"
    normalize: str = "none"
    group_options: tuple[str, ...] = ()
    can_rewrite_theta = False
    why_steps_differ: str | None = None

    def estimate(self, step: Step) -> Estimate:
        """Evaluate the losses of a step. It may leave the weights moved: `Estimate.update` accounts for that."""
        raise NotImplementedError

    def check_options(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check its options in the groups, and remember them, before anything of a step is prepared.

        Raises:
            TypeError, ValueError: an option is invalid.
        """

    def check_directions(self, directions: int) -> None:
        """Raise ValueError unless it can estimate along so many directions a step."""

    def begin(self, changed: bool) -> None:
        """Begin a step. `changed`: something other than the optimizer has changed weights since the last one."""

    def fill_group(self, group: dict[str, Any]) -> None:
        """Add its options to a new parameter group where they are missing, and check them."""

    def forget(self) -> None:
        """Forget what it remembers of the weights: from now on other memory is trained, or under other names."""

    def anchors(self, weights: Sequence[Weight], kept: Mapping[Tensor, dict[str, Any]]) -> Sequence[Tensor] | None:
        """Return for each weight a snapshot that passes may start from; None if the estimator has none.

        Args:
            kept: `torch.optim.Optimizer.state`, which holds the snapshots.
        """
        return None

    def after_rebuild(self, weights: Weights, changed: bool) -> bool:
        """Adapt to new tables; return whether θ was written. `changed`: something else has changed the weights."""
        return False

    def rewrite_theta(self, weights: Weights) -> None:
        """Write θ from what the estimator keeps, if it `can_rewrite_theta`."""
        raise NotImplementedError

    def setup_fields(self) -> dict[str, Any]:
        """Return the fields of a trajectory's setup that depend on the estimator."""
        return {"svrg": False, "shared_direction": False, "anchored": False}

    def check_setup(self, setup: Setup) -> None:
        """Raise ValueError unless it can continue a run with this setup, of the same method."""

    def agreed(self, groups: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return texts "name: value" of what may change in every step, and must be equal on all ranks."""
        return []

    def options(self) -> list[str]:
        """Return texts "name: value" of its options, which must be equal on all ranks."""
        return []

    def state(self, groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
        """Return what `state_dict()` saves of it, besides `kept`."""
        return {}

    def check_state(self, zo: Mapping[str, Any], groups: int, blocks: int, steps: int) -> dict[str, Any]:
        """Check its part of a state that is being loaded, and return it.

        Args:
            zo: what the state has under "zo".
            groups, blocks: how many parameter groups and transformer blocks there are.
            steps: the state's step count.

        Raises:
            TypeError, ValueError: a value is invalid.
        """
        return {}

    def check_group(self, group: Mapping[str, Any], where: str) -> None:
        """Check its options in a parameter group of a state that is being loaded; `where` names the group."""

    def check_kept(
        self,
        kept: Mapping[Tensor, tuple[str, Mapping[Any, Any]]],
        run: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Tensor, str],
    ) -> None:
        """Check what a state that is being loaded keeps of each parameter.

        Args:
            kept: for each parameter the name of its entry, for messages, and the entry.
            run: what `check_state` returned.
            groups: the optimizer's parameter groups.
            names: of the parameters.
        """

    def load_state(
        self,
        run: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        kept: Mapping[Tensor, dict[str, Any]],
    ) -> bool:
        """Take a checked state; return whether θ must be rewritten from it before the next step."""
        return False

    def continue_from(
        self, end: ReplayedEnd, setup: Setup, trained: set[str], kept: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        """Continue where a replayed run ended; `trained` names the parameters that are trained now."""


@dataclass(frozen=True, slots=True)
class ReplayedEnd:
    """What an estimator remembers at the end of a replayed run.

    Attributes:
        normalizer: of SPSA.
        path: θ as the anchor plus a sum of directions; None if there is no anchor.
        dropped: blocks that are dropped until the next anchor.
        age: steps since the anchor; None if there is no anchor.
        anchors: pairs of a parameter and its anchor.
        begun: whether a step was taken after the last setup.
        anchor_losses: the mean loss at each anchor since the last setup.
    """

    normalizer: Normalizer
    path: Path | None
    dropped: frozenset[int]
    age: int | None
    anchors: Sequence[tuple[Tensor, Tensor]]
    begun: bool
    anchor_losses: Sequence[float]
