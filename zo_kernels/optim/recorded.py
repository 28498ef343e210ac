"""What an optimizer remembers of its steps: counts, the trajectory, and its state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from .. import checks, names, spec
from ..trajectory import Kind, Record, Setup, Trajectory
from ..trajectory.file import FoundFile
from .numbers import Numbers, Pair, Value, device_of, stacked
from .parallel import Ranks
from .recording import Recording, weight_setups
from .replay import Replay
from .trained import TrainedWeights
from .weights import Weights

T = TypeVar("T")


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

    def _took(
        self,
        weights: Weights,
        kind: Kind,
        rates: Sequence[float],
        eps: float,
        numbers: Numbers,
        pairs: Sequence[Pair],
        anchor_pairs: Sequence[Pair] = (),
    ) -> None:
        """Count a step that has been taken."""
        here: Any = tuple(pairs)
        there: Any = tuple(anchor_pairs)
        record = Record(self.step_count, kind, tuple(rates[::2]), here, there, eps=eps)
        self._gradients = numbers.gradients[0]
        self.step_count += 1
        self._steps_since_built += 1
        flat = [value for pair in (*pairs, *anchor_pairs) for value in pair]
        where = device_of(*flat)
        self._recording.took(record, weights, None if where is None else stacked(flat, where))

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

    def _failed(self, kind: Kind, reached: int) -> None:
        """Count a step that ended without an update; after a refusal the next one draws other directions, since these
        might fail for ever.
        """
        assert self._weights is not None
        record = Record(self.step_count, kind, probes=reached)
        if kind is Kind.REFUSED:
            self._gradients = [0.0] * self.directions
            self.step_count += 1
            self.refused_steps += 1
        self._recording.took(record, self._weights)

    @property
    def trajectory(self) -> Trajectory:
        return self._recording.trajectory

    @property
    def trajectory_path(self) -> FilePath | None:
        """The file that the trajectory is written to, if there is one."""
        return self._recording.path

    def _begin_record(self, weights: Weights, eps: float) -> None:
        key = (self._builds, eps, self.seed, self.directions, self.drop, *self._weight_decays())
        self._recording.begin(key, lambda continues: self._setup(weights, eps, continues), weights)

    def _agreed(self) -> list[str]:
        """What the ranks that take a step together must have in common."""
        return [*self._recording.setup_told, f"learning rates {self._rates()[::2]}"]

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
                weights nor the optimizer have changed.
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
                self._resume_from(trajectory, found, path, weights)
        except BaseException:
            for file in found:
                file.close()
            raise
        for told in filter(None, (file.told() for file in found)):
            warnings.warn(told, stacklevel=2)

    def _by_first(self, make: Callable[[], T]) -> T:
        return make() if self._ranks is None else self._ranks.from_first(make)

    def _resume_from(self, trajectory: Trajectory, found: list[FoundFile], path: str | FilePath, weights: str) -> None:
        """As `resume`. All is checked, and what is not sound of the file is copied, before anything is changed."""
        if weights == "first":  # what an interrupted step left of its rounding went with the process
            trajectory = trajectory.without_interrupted_end()
        if weights == "last" and trajectory.steps != self.step_count:
            raise ValueError(
                f"resume: expected the state (load_state_dict) after step {trajectory.steps}, where {path} ends, got "
                f"an optimizer after step {self.step_count}"
            )
        replay = None
        if trajectory.setups:
            last = trajectory.setups[-1][1]
            if last.method != type(self).__name__:
                raise ValueError(f"resume: expected a trajectory of {type(self).__name__}, got one of {last.method}")
            if self._ranks is not None and weights == "first":
                self._ranks.check_directions(last.directions)
            self._warn_of_other_options(last)
            replay = Replay(self._names, trajectory, self.backend, check_values=weights == "first")
        self._by_first(lambda: [file.set_aside() for file in found])
        if replay is not None and weights == "first":
            replay.run()
            self._go_on_from(replay, last)
        elif replay is not None:
            self._recording.note_versions(self._prepare())
        self._by_first(lambda: self._recording.go_on(found[0], trajectory))
        if not found:
            self._recording.go_on(None, trajectory)

    def _warn_of_other_options(self, setup: Setup) -> None:
        """Of a run that is gone on with."""
        kept = {"seed": self.seed, "directions": self.directions, "drop": self.drop}
        changed = {"eps": self._eps(), "weight_decays": tuple(self._weight_decays()[::2])}
        changed |= {"in_place": self.perturb == "in_place", "stochastic": self.rounding != "nearest"}
        for own, what in ((kept, "the run's are taken"), (changed, "the optimizer's are taken from here on")):
            names_of_others = [name for name, value in own.items() if value != getattr(setup, name)]
            if names_of_others:
                told = ", ".join(f"{name} {getattr(setup, name)} (not {own[name]})" for name in names_of_others)
                warnings.warn(f"resume: the run had {told}; {what}", stacklevel=4)

    def _go_on_from(self, replay: Replay, setup: Setup) -> None:
        trajectory = replay.trajectory
        self.step_count = trajectory.steps
        self.refused_steps = trajectory.refused_steps
        self.seed, self.directions, self.drop = setup.seed, setup.directions, setup.drop
        by_name = {name: p for p, name in names.bare(self._names).items()}
        self._thresholds = {by_name[w.name]: w.threshold for w in setup.weights if w.threshold is not None}
        self._weights = None
        self._recording.note_versions(self._prepare())

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, and what the run needs to go on bit for bit, under "zo"."""
        self._recording.sync()
        return {**super().state_dict(), "zo": self._zo_state()}

    def _zo_state(self) -> dict[str, Any]:
        parameters = [p for g in self.param_groups for p in g["params"]]
        return {
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run: the next step draws what it would have drawn.

        Raises:
            ValueError: the state is of another kind of optimizer, or its parameters have other ids (names).
        """
        if "zo" not in state_dict:
            raise ValueError("state_dict: expected the state of a zeroth-order optimizer, got one without 'zo'")
        zo = state_dict["zo"]
        ours = self._zo_state()
        for key in ("method", "noise", "param_ids"):
            if zo.get(key) != ours[key]:
                raise ValueError(f"state_dict: expected {key} {ours[key]!r}, got {zo.get(key)!r}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        for key in ("seed", "step_count", "refused_steps", "directions", "drop"):
            setattr(self, key, zo[key])
        parameters = [p for g in self.param_groups for p in g["params"]]
        self._thresholds = {p: h for p, h in zip(parameters, zo["thresholds"], strict=True) if h is not None}
        self._weights = None
        self._recording.forget_versions()

    def __getstate__(self) -> dict[str, Any]:
        # The tables hold addresses, so a copy builds its own; a scheduler's wrapper of `step` is bound to the original.
        own = {k: v for k, v in self.__dict__.items() if k != "step"}
        return {**own, "_weights": None, "_built_for": None, "_in_forward": None}
