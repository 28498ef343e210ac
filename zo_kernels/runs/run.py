"""A run: it counts and records its steps, and knows whether the weights are those of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .. import names, spec
from ..closures.losses import Refused
from ..estimators.draws import Draws
from ..estimators.protocol import Estimate, Estimator
from ..estimators.spsa import SPSA
from ..estimators.svrg import SVRG
from ..interrupts import Call, at_once, signals_held
from ..perturbation.choice import Perturbation
from ..perturbation.place import Probes
from ..ranks.messages import options_of
from ..ranks.parallel import Ranks
from ..trajectory import Kind, Record, Setup
from ..warn import Warner
from ..weights.groups import rates_of, weight_decays_of
from ..weights.rows import Value, device_of, stacked
from ..weights.tables import Weights
from ..weights.trained import Trained, trainable
from .recording import Recording, weight_setups

VISIT = "_inside"  # name of the attribute that holds the last visit of `attempt.alone`; copies do not have it
REPLAYED = SPSA.estimate, SVRG.estimate  # the updates that `replay.py` can repeat from losses
Groups = Sequence[Mapping[str, Any]]
Kept = Mapping[Tensor, dict[str, Any]]  # torch.optim.Optimizer.state


@dataclass(slots=True)
class Progress:
    """How far a step has come.

    Attributes:
        probes: the probes that move the weights; None as long as nothing can have moved.
        recorded: the step's record; None until the step is recorded as taken, skipped or interrupted.
        seen: whether the changes that the step made to weights are noted, so that they do not count as others'.
    """

    probes: Probes | None = None
    recorded: Record | None = None
    seen: bool = False


class Run:
    """Counts, records and restores the steps of one optimizer. It has the optimizer's other parts at hand.

    Args:
        method: the name of the optimizer's class, as a trajectory records it.
        seed, directions: of the run.
        sync: when the trajectory's file is forced to the disk.

    Attributes:
        steps: how many steps were taken, skipped ones included.
        refused_here: how many of them were skipped; steps that a device skipped are counted in `recording`.
        gradients: the projected gradients of the last step.
        recording: the trajectory and its file.
        lost: whether the values of the weights are unknown, because a pass did not end.
        progress: of the current step; None between steps.
        attempts: how many steps have begun.
    """

    def __init__(
        self,
        method: str,
        seed: int,
        directions: int,
        sync: str,
        warner: Warner,
        trained: Trained,
        perturbation: Perturbation,
        estimator: Estimator,
        ranks: Ranks | None,
    ):
        self.method, self.seed, self.directions, self.warner = method, seed, directions, warner
        self.trained, self.perturbation, self.estimator, self.ranks = trained, perturbation, estimator, ranks
        self.recording = Recording(sync, warner)
        self.steps = self.refused_here = self.attempts = 0
        self.gradients: list[Value] = []
        self.lost = False
        self.progress: Progress | None = None
        self._replayable = type(estimator).estimate in REPLAYED
        if not self._replayable:
            warner.note(
                "replay",
                f"estimator: {type(estimator).__name__} computes updates that a replay does not know, so this run's "
                "trajectory cannot be replayed or resumed; add them to runs/replay.py, and to REPLAYED in runs/run.py",
            )

    @property
    def refused_steps(self) -> int:
        """Steps that were skipped so far; this waits for a device."""
        return self.refused_here + self.recording.refused_unseen

    @refused_steps.setter
    def refused_steps(self, n: int) -> None:
        self.refused_here = n - self.recording.refused_unseen

    def draws(self) -> Draws:
        """Return what the next step draws."""
        return Draws(self.seed, self.steps, self.directions, self.trained.drop, self.trained.n_blocks)

    def prepare(self, groups: Groups, kept: Kept) -> Weights:
        """Return valid tables; build new ones if a parameter was frozen, unfrozen, moved, cast or added.

        Args:
            groups, kept: the optimizer's `param_groups` and `state`.
        """
        trained, perturbation, estimator = self.trained, self.perturbation, self.estimator
        if trained.follow(groups):
            estimator.forget()
        if (weights := trained.current(groups)) is not None:
            return weights
        perturbation.settle()
        perturbation.choose(trainable(groups))
        if trained.trains_other_memory(groups):
            estimator.forget()
        found = trained.find(groups)
        anchors = estimator.anchors(found, kept)
        keep_masks = perturbation.name == "in_place" or anchors is not None
        where = perturbation.execution_device
        weights = trained.build(found, groups, anchors, kept, keep_masks=keep_masks, copied_to=where)
        perturbation.use(weights)
        if estimator.after_rebuild(weights, self.recording.changed_by_others(weights)):
            self.recording.note_versions(weights)
        trained.use(weights, groups)
        return weights

    def begin(self, weights: Weights, eps: float, groups: Groups) -> None:
        """Begin a step: agree with the other ranks, and append a setup to the trajectory if one is due."""
        key = (self.trained.builds, eps, self.seed, self.directions, self.trained.drop, *weight_decays_of(groups))
        if self.ranks is not None:
            on_gpu = weights.theta[0].device.type == "cuda" or self.perturbation.execution_device is not None
            options = partial(self._options, weights, eps, groups)
            self.ranks.begin(self.steps, key, self.directions, on_gpu, options)
        self.recording.begin(key, partial(self.setup, weights, eps, groups), weights)
        self.trained.begin_step(weights, groups, self.steps, self.recording.changed)

    def taking(self, progress: Progress, estimate: Estimate, eps: float) -> list[Call]:
        """Return the calls that count and record a step. The pass that takes the step makes them; then call `taken`."""
        here: Any = tuple(estimate.losses.pairs)
        there: Any = tuple(estimate.anchor_pairs)
        record = Record(self.steps, estimate.kind, tuple(estimate.rates[::2]), here, there, eps=eps)
        return [
            *self.recording.adding(record, estimate.numbers.losses),
            partial(setattr, self, "gradients", estimate.numbers.gradients[0]),
            partial(setattr, self, "steps", self.steps + 1),
            partial(setattr, self.trained, "steps", self.trained.steps + 1),
            partial(setattr, progress, "recorded", record),
        ]

    def failing(self, progress: Progress, kind: Kind) -> list[Call]:
        """Return the calls that record a skipped or interrupted step, to be made when the weights are restored."""
        record = Record(self.steps, kind, probes=0 if progress.probes is None else progress.probes.moves)
        noted: list[Call] = [*self.recording.adding(record), partial(setattr, progress, "recorded", record)]
        if kind is Kind.INTERRUPTED:
            return noted
        return [  # a skipped step counts, so that the next one draws other directions, which may not fail
            *noted,
            partial(setattr, self, "gradients", [0.0] * self.directions),
            partial(setattr, self, "steps", self.steps + 1),
            partial(setattr, self, "refused_here", self.refused_here + 1),
        ]

    def taken(self, progress: Progress, weights: Weights) -> None:
        """Write the record of a step that was taken, skipped or interrupted to the trajectory's file."""
        assert progress.recorded is not None
        if not progress.seen:
            self.recording.note_versions(weights)
            progress.seen = True  # later changes, such as those by hooks after the step, count as others'
        self.recording.added(progress.recorded, weights)

    def interrupted_before(self, error: BaseException) -> None:
        """Record that an exception from outside ended a step before it began. Errors in arguments are not recorded."""
        if isinstance(error, (ValueError, TypeError, RuntimeError)) or not self.recording.has_begun:
            return
        with signals_held(), suppress(OSError, RuntimeError):
            at_once(self.recording.adding(Record(self.steps, Kind.INTERRUPTED)))
            self.recording.write()

    def projected_gradients(self) -> list[float]:
        """Return the projected gradients of the last step as floats; this may wait for a device."""
        if (where := device_of(*self.gradients)) is not None:
            self.gradients = stacked(self.gradients, where).tolist()
        numbers: Any = self.gradients
        return list(numbers)

    def restore(self, probes: Probes, weights: Weights) -> bool:
        """Restore θ as it was before the step; return whether that was possible. It can be called repeatedly."""
        exact = self.estimator.can_rewrite_theta
        if weights.torn and not exact:
            self.give_up()
            return False
        probes.to({})
        if exact and weights.torn:
            self.estimator.rewrite_theta(weights)  # all of it
        elif weights.overwritten and not exact:
            self.give_up()
        return True

    def give_up(self) -> None:
        """Note that the values of the weights are unknown: no step is taken until weights are loaded."""
        self.lost = True
        if self.perturbation.place is not None:
            self.perturbation.place.restore()
        if self.trained.weights is not None:
            self.recording.note_versions(self.trained.weights)

    def check_whole(self, weights: Weights) -> None:
        """Raise RuntimeError if the values of the weights are unknown, and nobody has loaded others."""
        if not self.lost:
            return
        if not self.recording.changed_by_others(weights):
            raise RuntimeError(
                "weights: expected those of a whole step, but in one the backend failed, the closure wrote to them, or "
                "exceptions came at once; load them again, from a checkpoint or by resuming the trajectory"
            )
        self.lost = weights.torn = weights.overwritten = False

    def note_writes(self, weights: Weights, eps: float, groups: Groups) -> None:
        """End the trajectory if a closure wrote to weights that are perturbed in the forward.

        Raises:
            Refused: a closure did, and the optimizer is strict.
        """
        wrote, met = (set[int](), False) if self.perturbation.place is None else self.perturbation.place.writes()
        if not wrote and not (met and self.recording.changed_by_others(weights)):
            return
        undone = self.estimator.can_rewrite_theta
        if not undone:
            self.recording.cut(partial(self.setup, weights, eps, groups))
        message = (
            f"it wrote to {', '.join(weights.weights[i].name for i in sorted(wrote)[:5]) or 'weights'} in step "
            f"{self.steps}; if between the losses of a step, these are of different weights, and "
            + ("MeZO-SVRG undoes it" if undone else f"a replay of the trajectory ends there (upto={self.steps})")
        )
        if self.warner.strict:
            raise Refused(ValueError, message)
        self.warner.warn("writes", f"closure: {message}")

    def agreed(self, groups: Groups) -> list[str]:
        """Return texts "name: value" of what may change in every step, and must be equal on all ranks."""
        return [
            f"learning rates: {rates_of(groups)[::2]}",
            f"weights changed from outside: {self.recording.changed_from_outside}",
            *self.estimator.agreed(groups),
        ]

    def _options(self, weights: Weights, eps: float, groups: Groups) -> list[str]:
        """Return texts "name: value" of all other options that must be equal on all ranks."""
        assert self.ranks is not None
        settings = {
            "method": self.method,
            "parallel": self.ranks.how.split,
            "check_every": self.ranks.how.check_every,
            "directions": self.directions,
            "seed": self.seed,
            "eps": eps,
            "weight_decay": weight_decays_of(groups)[::2],
            "drop": self.trained.drop,
            "blocks": self.trained.n_blocks,
            "sparsity": [group["sparsity"] for group in groups],
            "perturb": self.perturbation.name,
            "stochastic rounding": weights.stochastic,
            "distribution": weights.distribution,
            "mask": self.trained.mask,
            "strict": self.warner.strict,
            "noise": spec.VERSION,
        }
        return [*options_of(settings, weights, names.bare(self.trained.names)), *self.estimator.options()]

    def setup(self, weights: Weights, eps: float, groups: Groups, continues: bool) -> Setup:
        """Return the setup of the next steps: what they have in common, as a trajectory records it."""
        return Setup(
            method=self.method,
            noise=spec.VERSION,
            distribution=weights.distribution,
            mask=self.trained.mask,
            step=self.steps,
            continues=continues and self._replayable,
            seed=self.seed,
            directions=self.directions,
            eps=eps,
            drop=self.trained.drop,
            blocks=self.trained.n_blocks,
            in_place=self.perturbation.name == "in_place",
            stochastic=weights.stochastic,
            weight_decays=tuple(weight_decays_of(groups)[::2]),
            **self.estimator.setup_fields(),
            weights=weight_setups(weights, names.bare(self.trained.names)),
        )

    def on_first(self, make: Any) -> bytes | None:
        """Call `make`, of several ranks on the first one alone, and return its result."""
        return make() if self.ranks is None else self.ranks.from_first(make)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != VISIT} | {"progress": None}
