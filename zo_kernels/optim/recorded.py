"""What an optimizer remembers of its steps: counts, the trajectory, and its state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from .. import checks, names, spec
from ..trajectory import Kind, Record, Setup, Trajectory
from .numbers import Numbers, Pair, Value, device_of, stacked
from .parallel import Ranks
from .recording import Recording, weight_setups
from .replay import Replay
from .shards import is_sharded
from .trained import TrainedWeights
from .weights import Weights


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
        if self._ranks is not None:
            on_gpu = weights.theta[0].device.type == "cuda" or self._execution_device is not None
            self._ranks.begin(self.step_count, key, self.directions, on_gpu, lambda: self._options(weights, eps))
        self._recording.begin(key, lambda continues: self._setup(weights, eps, continues), weights)

    def _agreed(self) -> list[str]:
        """What the ranks that take a step together must have in common, and what may change from step to step; as texts
        "name: value".
        """
        return [
            f"learning rates: {self._rates()[::2]}",
            f"weights changed from outside: {self._recording.changed_from_outside}",
        ]

    def _options(self, weights: Weights, eps: float) -> list[str]:
        """What else they must have in common."""
        assert self._ranks is not None
        how = self._ranks.how
        options = {
            "method": type(self).__name__,
            "parallel": how.split,
            "check_every": how.check_every,
            "directions": self.directions,
            "seed": self.seed,
            "eps": eps,
            "weight_decay": self._weight_decays()[::2],
            "drop": self.drop,
            "blocks": self._n_blocks,
            "sparsity": [group["sparsity"] for group in self.param_groups],
            "perturb": self.perturb,
            "stochastic rounding": weights.stochastic,
            "noise": spec.VERSION,
        }
        told = names.bare(self._names)
        for w in weights.weights:
            how_sharded = f", {getattr(w.parameter, 'placements', '')}" if is_sharded(w.parameter) else ""
            exempt = ", no weight decay" if w.row % 2 else ""
            options[f"parameter {told[w.parameter]}"] = (
                f"{w.tensor.dtype} {w.shard.whole}{how_sharded} of group {w.row // 2}, block {w.block}, "
                f"noise {w.param_id}, threshold {w.threshold}{exempt}"
            )
        return [f"{name}: {value}" for name, value in options.items()]

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

        A step is appended by one write, so that the file holds it even if the process is killed right after.

        Raises:
            TypeError: it is no path.
            ValueError: the file exists.
        """
        if self._writes_files():
            self._recording.write_to(path)

    def _writes_files(self) -> bool:
        return self._ranks is None or self._ranks.is_first

    def resume(self, path: str | FilePath, *, weights: str = "first", missing_ok: bool = False) -> None:
        """Go on with a run that was cut off, and append to its trajectory's file from now on. What is cut off or
        damaged at the file's end is dropped from it. Of several ranks that take steps together the first reads and
        writes the file; how many they are may have changed.

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

        Raises:
            OSError: it cannot be read or written.
            ValueError: this optimizer has taken other steps already, writes another file, is of another method, or its
                parameters are not those that the run started with (see `zo_kernels.replay`).
        """
        checks.choice("weights", weights, ("first", "last"))
        if weights == "first" and self.step_count:
            raise ValueError(f"resume: expected an optimizer that has taken no step, got one after {self.step_count}")

        def load() -> bytes | None:
            if (own := self._recording.path) is not None:
                raise ValueError(
                    f"resume: expected an optimizer made without trajectory=, got one that writes to {own}"
                )
            missing = missing_ok and not os.path.exists(path)
            return None if missing else Trajectory.load(path, recover=True).to_bytes()

        data = load() if self._ranks is None else self._ranks.from_first(load)
        if data is None:
            self.record_to(path)
            return
        trajectory = Trajectory.from_bytes(data)
        if weights == "first":  # what an interrupted step left of its rounding went with the process
            trajectory = trajectory.without_interrupted_end()
        if weights == "last" and trajectory.steps != self.step_count:
            raise ValueError(
                f"resume: expected the state (load_state_dict) after step {trajectory.steps}, where {path} ends, got "
                f"an optimizer after step {self.step_count}"
            )
        if trajectory.setups:
            last = trajectory.setups[-1][1]
            if last.method != type(self).__name__:
                raise ValueError(f"resume: expected a trajectory of {type(self).__name__}, got one of {last.method}")
            self._warn_of_other_options(last)
            replay = Replay(self._names, trajectory, self.backend, check_values=weights == "first")
            if weights == "first":
                replay.run()
                self._go_on_from(replay, last)
            else:
                self._recording.note_versions(self._prepare())
        self._recording.go_on(path if self._writes_files() else None, trajectory)

    def _warn_of_other_options(self, setup: Setup) -> None:
        """Of a run that is gone on with."""
        kept = {"seed": self.seed, "directions": self.directions, "drop": self.drop}
        changed = {"eps": self._eps(), "weight_decays": tuple(self._weight_decays()[::2])}
        changed |= {"in_place": self.perturb == "in_place", "stochastic": self.rounding != "nearest"}
        for own, what in ((kept, "the run's are taken"), (changed, "the optimizer's are taken from here on")):
            names_of_others = [name for name, value in own.items() if value != getattr(setup, name)]
            if names_of_others:
                told = ", ".join(f"{name} {getattr(setup, name)} (not {own[name]})" for name in names_of_others)
                warnings.warn(f"resume: the run had {told}; {what}", stacklevel=3)

    def _go_on_from(self, replay: Replay, setup: Setup) -> None:
        trajectory = replay.trajectory
        if self._ranks is not None:
            self._ranks.check_directions(setup.directions)
        self.step_count = trajectory.steps
        self.refused_steps = trajectory.refused_steps
        self.seed, self.directions, self.drop = setup.seed, setup.directions, setup.drop
        by_name = {name: p for p, name in names.bare(self._names).items()}
        self._thresholds = {by_name[w.name]: w.threshold for w in setup.weights if w.threshold is not None}
        self._weights = None
        self._recording.note_versions(self._prepare())

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, and what the run needs to go on bit for bit, under "zo"."""
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
