"""What an optimizer remembers of its steps: counts, the trajectory, and its state."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from .. import checks, names, spec
from ..interrupts import Call, at_once, signals_held
from ..trajectory import Kind, Record, Setup, Trajectory
from ..trajectory.file import FoundFile
from . import state
from .alone import NOT_COPIED, alone
from .attempt import Attempt
from ..closures.losses import Refused
from ..weights.masks import Thresholds
from ..estimators.numbers import Numbers
from ..closures.losses import Pair
from ..weights.rows import Value, device_of, stacked
from ..ranks.parallel import Ranks
from ..perturbation.in_place import Probes
from .recording import Recording, weight_setups
from .replay import Replay
from .resuming import resume_from
from ..weights.trained import TrainedWeights
from ..warn import warn
from ..weights.tables import Weights
from ..ranks.wording import options_of


class RecordedSteps(TrainedWeights):
    """Steps that are counted and recorded as they are taken, and can be gone on from."""

    seed: int
    directions: int
    drop: float
    step_count: int
    _n_blocks: int
    _refused_steps: int
    _gradients: list[Value]
    _recording: Recording
    _ranks: Ranks | None
    _attempt: Attempt | None = None  # at the step that is being taken
    _attempts = 0
    _torn: bool  # whether a pass did not end, so that nobody knows the weights

    def _taking(
        self,
        attempt: Attempt,
        weights: Weights,
        kind: Kind,
        rates: Sequence[float],
        eps: float,
        numbers: Numbers,
        pairs: Sequence[Pair],
        anchor_pairs: Sequence[Pair] = (),
    ) -> list[Call]:
        """What counts and records a step, to be called with the pass that takes it; `_taken` is to follow."""
        here: Any = tuple(pairs)
        there: Any = tuple(anchor_pairs)
        record = Record(self.step_count, kind, tuple(rates[::2]), here, there, eps=eps)
        return [
            *self._recording.adding(record, numbers.losses),
            partial(setattr, self, "_gradients", numbers.gradients[0]),
            partial(setattr, self, "step_count", self.step_count + 1),
            partial(setattr, self, "_steps_since_built", self._steps_since_built + 1),
            partial(setattr, attempt, "recorded", record),
        ]

    def _failing(self, attempt: Attempt, kind: Kind) -> list[Call]:
        """As `_taking`, of a step that was refused or interrupted, when the weights are restored."""
        record = Record(self.step_count, kind, probes=0 if attempt.probes is None else attempt.probes.moves)
        noted: list[Call] = [*self._recording.adding(record), partial(setattr, attempt, "recorded", record)]
        if kind is Kind.INTERRUPTED:
            return noted
        return [  # the next step draws other directions: these might fail for ever
            *noted,
            partial(setattr, self, "_gradients", [0.0] * self.directions),
            partial(setattr, self, "step_count", self.step_count + 1),
            partial(setattr, self, "_refused_steps", self._refused_steps + 1),
        ]

    def _interrupted_before(self, error: BaseException) -> None:
        """Note that an exception from outside kept a step from beginning; what is wrong with its arguments does not."""
        if isinstance(error, (ValueError, TypeError, RuntimeError)) or not self._recording.has_begun:
            return
        with signals_held(), suppress(OSError, RuntimeError):
            at_once(self._recording.adding(Record(self.step_count, Kind.INTERRUPTED)))
            self._recording.write()

    def _taken(self, attempt: Attempt, weights: Weights) -> None:
        """Write down a step that was taken, refused or interrupted, and recorded."""
        assert attempt.recorded is not None
        if not attempt.seen:
            self._recording.note_versions(weights)
            attempt.seen = True  # later changes, such as those of hooks after the step, are others'
        self._recording.added(attempt.recorded, weights)

    @property
    def projected_gradients(self) -> list[float]:
        if (where := device_of(*self._gradients)) is not None:
            self._gradients = stacked(self._gradients, where).tolist()
        return list(self._gradients)  # type: ignore[arg-type]

    @property
    def refused_steps(self) -> int:
        return self._refused_steps + self._recording.refused_unseen

    @refused_steps.setter
    def refused_steps(self, n: int) -> None:
        self._refused_steps = n - self._recording.refused_unseen

    def _restore(self, probes: Probes, weights: Weights) -> bool:
        """Bring θ back to where it was before the step, if that can be; it may be called again and again."""
        if weights.torn:
            self._give_up()
            return False
        probes.to({})
        if weights.overwritten:
            self._give_up()
        return True

    def _give_up(self) -> None:
        """Nobody knows what the weights are, so no step is taken until others are loaded."""
        self._torn = True
        if self._in_forward is not None:
            self._in_forward.restore()
        if self._weights is not None:
            self._recording.note_versions(self._weights)

    def _check_whole(self, weights: Weights) -> None:
        """Raise RuntimeError if the weights are not known to be those of a step."""
        if not self._torn:
            return
        if not self._recording.changed_by_others(weights):
            raise RuntimeError(
                "weights: expected those of a whole step, but in one the backend failed, the closure wrote to them, or "
                "exceptions came at once; load them anew, from a checkpoint or by resuming the trajectory"
            )
        self._torn = weights.torn = weights.overwritten = False

    @property
    def trajectory(self) -> Trajectory:
        return self._recording.trajectory

    @property
    def trajectory_path(self) -> FilePath | None:
        """The file that the trajectory is written to, if there is one."""
        return self._recording.path

    def _begin_record(self, weights: Weights, eps: float) -> None:
        key = (self._builds, eps, self.seed, self.directions, self.drop, *self._weight_decays())
        if self._ranks is not None:
            on_gpu = weights.theta[0].device.type == "cuda" or self._execution_device is not None
            self._ranks.begin(self.step_count, key, self.directions, on_gpu, lambda: self._options(weights, eps))
        self._recording.begin(key, lambda continues: self._setup(weights, eps, continues), weights)
        self._thresholds.look(weights, self.param_groups, self.step_count, self._recording.changed)

    def _note_writes(self, weights: Weights, eps: float) -> None:
        """Of the closure, to weights that are perturbed in the forward, where nobody moves them.

        Raises:
            Refused: it did, and the optimizer is strict.
        """
        wrote, met = (set(), False) if self._in_forward is None else self._in_forward.vigilance.take()
        if not wrote and not (met and self._recording.changed_by_others(weights)):
            return
        svrg = self._svrg_setup()["svrg"]
        if not svrg:
            self._recording.begin_anew(lambda continues: self._setup(weights, eps, continues))
        told = (
            f"it wrote to {', '.join(weights.weights[i].name for i in sorted(wrote)[:5]) or 'weights'} in step "
            f"{self.step_count}; if between the losses of a step, these are of different weights, and "
            + ("MeZO-SVRG undoes it" if svrg else f"a replay of the trajectory ends there (upto={self.step_count})")
        )
        if self._warner.strict:
            raise Refused(ValueError, told)
        self._warner.warn("writes", f"closure: {told}")

    def _agreed(self) -> list[str]:
        """As texts "name: value" what ranks must have in common to take a step, of what may change between steps."""
        return [
            f"learning rates: {self._rates()[::2]}",
            f"weights changed from outside: {self._recording.changed_from_outside}",
        ]

    def _options(self, weights: Weights, eps: float) -> list[str]:
        """What else they must have in common."""
        return options_of(self, weights, eps)

    def _svrg_setup(self) -> dict[str, bool]:
        """The fields of a setup that are MeZO-SVRG's."""
        return {"svrg": False, "shared_direction": False, "anchored": False}

    def _setup(self, weights: Weights, eps: float, continues: bool) -> Setup:
        return Setup(
            method=type(self).__name__,
            noise=spec.VERSION,
            step=self.step_count,
            continues=continues,
            seed=self.seed,
            directions=self.directions,
            eps=eps,
            drop=self.drop,
            blocks=self._n_blocks,
            in_place=self.perturb == "in_place",
            stochastic=weights.stochastic,
            weight_decays=tuple(self._weight_decays()[::2]),
            **self._svrg_setup(),
            weights=weight_setups(weights, names.bare(self._names)),
        )

    def record_to(self, path: str | FilePath) -> None:
        """Write the trajectory to a new file: the steps so far, and every step to come as it is taken. Of several ranks
        that take steps together the first writes it.

        A step is appended by one write, so that the file holds it even if the process is killed right after. Whether it
        survives a power cut depends on the option `sync`. No other process can write the file as long as this one does.

        Raises:
            TypeError: it is no path.
            ValueError: the file exists, or its folder does not.
        """
        if self._writes_files():
            self._recording.write_to(path)

    def _writes_files(self) -> bool:
        return self._ranks is None or self._ranks.is_first

    @alone("resume")
    def resume(
        self, path: str | FilePath, *, weights: str = "first", missing_ok: bool = False, recover: bool = False
    ) -> None:
        """Go on with a run that was cut off, and append to its trajectory's file from now on. A last record that is
        incomplete, as a killed process or a full disk leaves it, is cut off the file. Of several ranks that take steps
        together the first reads and writes the file; how many they are may have changed.

        The next step is the one that the run would have taken, if the optimizer was made with the run's options: seed,
        directions, drop, sparsity's thresholds (and MeZO-SVRG's shared_direction) are taken from the file, eps, weight
        decay, perturb and rounding are not; a warning says which of them differ. Nor are learning rates: set the
        scheduler to `step_count`, and the data to the same place.

        Args:
            path: the file.
            weights: which weights the parameters hold: "first", those that the run started with, onto which the file is
                replayed; or "last", those after its last step, from a checkpoint. The optimizer's `state_dict` is to be
                loaded before then. That the weights are the last ones is noticed by the next replay of the file.
            missing_ok: if there is no such file, begin it (`record_to`) instead of raising FileNotFoundError. A program
                that does this at its start goes on with its run, however often it is started.
            recover: if the file is damaged, or from some record on of a newer version, go on after its longest sound
                beginning. The rest is moved to a file beside it (run.zo.damaged-1), and a warning says where it is and
                how many steps are gone.

        Raises:
            OSError: it cannot be read or written, or another process writes it (BlockingIOError).
            ValueError: this optimizer has taken other steps already, writes another file, is of another method, or its
                parameters are not those that the run started with (see `zo_kernels.replay`); or the file is damaged, of
                a newer version or no trajectory: the message says where, and what to do. Then neither the file nor the
                weights nor the optimizer have changed; but if the replay comes to other weights than the run had (they
                were changed on the way, unnoticed, or a machine computed wrong), the parameters hold these.
        """
        checks.choice("weights", weights, ("first", "last"))
        for name, option in (("missing_ok", missing_ok), ("recover", recover)):
            if not isinstance(option, bool):
                raise TypeError(f"{name}: expected a bool, got {type(option).__name__}")
        if weights == "first" and self.step_count:
            raise ValueError(f"resume: expected an optimizer that has taken no step, got one after {self.step_count}")
        found: list[FoundFile] = []  # on the rank that reads it

        def find() -> bytes | None:
            if (own := self._recording.path) is not None:
                raise ValueError(
                    f"resume: expected an optimizer made without trajectory=, got one that writes to {own}"
                )
            if missing_ok and not os.path.lexists(path):
                self._recording.write_to(path)
                return None
            found.append(FoundFile(path, recover))
            return found[0].trajectory.to_bytes()

        try:
            data = self._by_first(find)
            if data is not None:
                trajectory = found[0].trajectory if found else Trajectory.from_bytes(data)
                resume_from(self, trajectory, found, path, weights)
        except BaseException:
            for file in found:
                file.close()
            raise
        for told in filter(None, (file.told() for file in found)):
            warn(told)

    def _by_first(self, make: Callable[[], bytes | None]) -> bytes | None:
        return make() if self._ranks is None else self._ranks.from_first(make)

    def _go_on_from(self, replay: Replay, setup: Setup) -> None:
        trajectory = replay.trajectory
        self.step_count = trajectory.steps
        self.refused_steps = trajectory.refused_steps
        self.seed, self.directions, self.drop = setup.seed, setup.directions, setup.drop
        by_name = {name: p for p, name in names.bare(self._names).items()}
        self._thresholds = Thresholds.of_trajectory(self._warner, by_name, trajectory)
        self._weights = None
        self._recording.note_versions(self._prepare())

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, and what the run needs to go on bit for bit, under "zo"."""
        self._recording.sync()
        return {**super().state_dict(), "zo": self._zo_state()}

    def _zo_state(self) -> dict[str, Any]:
        parameters = self._parameters()
        return {
            "version": state.VERSION,
            "method": type(self).__name__,
            "noise": spec.VERSION,
            "seed": self.seed,
            "step_count": self.step_count,
            "refused_steps": self.refused_steps,
            "directions": self.directions,
            "drop": self.drop,
            "param_ids": [self._ids[p] for p in parameters],
            "thresholds": [self._thresholds.get(p) for p in parameters],
        }

    @alone("load_state_dict")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run: the next step draws what it would have drawn. Options in the state count, not those that this
        optimizer was made with: lr, eps, weight_decay, sparsity, seed, directions, drop, and MeZO-SVRG's; but for
        perturb, rounding, backend, parallel and what else says how a step is computed, which stay this optimizer's.

        Raises:
            TypeError, ValueError: the state is of another kind of optimizer or of a newer zo_kernels, its parameters
                have other ids (names), or a value in it cannot be, which the message names. Nothing is changed, nor is
                anything if a hook raises.
        """
        if "zo" not in state.mapping("state_dict", state_dict):
            raise ValueError("state_dict: expected the state of a zeroth-order optimizer, got one without 'zo'")
        given: Any = {key: value for key, value in state_dict.items() if key != "zo"}
        before = dict(self.__dict__)
        hooks = before.get("_optimizer_load_state_dict_pre_hooks", {})
        for hook in hooks.values():  # which torch calls when it is too late to check what they make of the state
            if (changed := hook(self, given)) is not None:
                given = changed
        run = self._check_run(state_dict["zo"])
        self._check_kept(state.check_torch(given, self.param_groups, self._check_more), run)
        unseen, weights = self._recording.refused_unseen, self._weights
        ours = weights is not None and not self._recording.changed_by_others(weights)
        versions = self._recording.forget_versions()
        try:
            self._optimizer_load_state_dict_pre_hooks = type(hooks)()
            super().load_state_dict(given)
            self._optimizer_load_state_dict_pre_hooks = hooks
            for key in ("seed", "step_count", "directions", "drop"):
                setattr(self, key, run[key])
            self._refused_steps = run["refused_steps"] - unseen
            self._thresholds = Thresholds.of_state(self._warner, self._parameters(), run)
            self._weights = self._attempt = None
            self._take_state(run)
            self._recording.forget_versions()  # the model may be loaded after its optimizer
        except BaseException:
            with signals_held():
                for key in self.__dict__.keys() - before.keys():
                    del self.__dict__[key]
                self.__dict__.update(before)
                self._recording.restore_versions(versions)
                if weights is not None and versions is not None and ours:  # what was written was put back
                    self._recording.note_versions(weights)
            raise

    def _check_run(self, zo: Any) -> dict[str, Any]:
        """What `load_state_dict` takes of the run, of which all is checked."""
        names_of_them = [self._names[p] for p in self._parameters()]
        run = state.check_run(zo, self._zo_state(), names_of_them, self._n_blocks)
        if self._ranks is not None:
            self._ranks.check_directions(run["directions"])
        return run

    def _check_more(self, group: Mapping[str, Any], where: str) -> None:
        """Of a parameter group in a state, what a method has besides."""

    def _check_kept(self, kept: Mapping[Tensor, tuple[str, Mapping[Any, Any]]], run: dict[str, Any]) -> None:
        """What a method keeps of each parameter: in a state, what to call it and the entry."""

    def _take_state(self, run: dict[str, Any]) -> None:
        """What a method has besides, which is checked."""

    def __getstate__(self) -> dict[str, Any]:
        # The tables hold addresses, so a copy builds its own; a scheduler's wrapper of `step` is bound to the original.
        own = {k: v for k, v in self.__dict__.items() if k not in ("step", "_attempt", NOT_COPIED)}
        return {**own, "_weights": None, "_built_for": None, "_in_forward": None}
