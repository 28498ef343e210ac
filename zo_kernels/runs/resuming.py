"""Continues a run that was cut off, from its trajectory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import checks, names
from ..estimators.protocol import ReplayedEnd
from ..trajectory import Setup, Trajectory
from ..trajectory.recorder import FoundFile
from ..warn import warn
from ..weights.groups import eps_of, weight_decays_of
from ..weights.kept import MASK
from ..weights.masks import Thresholds
from ..weights.tables import Weights
from ..weights.trained import trainable
from .replay import Replay
from .run import Groups, Kept, Run


class Resume:
    """Continues a run where a trajectory ends. All is checked before anything is changed.

    Args:
        run: of an optimizer that is to take the next steps.
        groups, kept: the optimizer's `param_groups` and `state`.
    """

    def __init__(self, run: Run, groups: Groups, kept: Kept):
        self._run, self._groups, self._kept = run, groups, kept

    def _prepare(self) -> Weights:
        return self._run.prepare(self._groups, self._kept)

    def __call__(self, path: str | Path, weights: str, missing_ok: bool, recover: bool) -> None:
        """Resume the run; see `ZeroOrderOptimizer.resume`."""
        run = self._run
        checks.choice("weights", weights, ("first", "last"))
        for name, option in (("missing_ok", missing_ok), ("recover", recover)):
            if not isinstance(option, bool):
                raise TypeError(f"{name}: expected a bool, got {type(option).__name__}")
        if weights == "first" and run.steps:
            raise ValueError(f"resume: expected an optimizer that has taken no step, got one after {run.steps}")
        found: list[FoundFile] = []  # stays empty on ranks other than the first

        def find() -> bytes | None:
            if (own := run.recording.path) is not None:
                raise ValueError(
                    f"resume: expected an optimizer made without trajectory=, got one that writes to {own}"
                )
            if missing_ok and not os.path.lexists(path):
                run.recording.write_to(path)
                return None
            found.append(FoundFile(path, recover))
            return found[0].trajectory.to_bytes()

        try:
            data = run.on_first(find)
            if data is not None:
                trajectory = found[0].trajectory if found else Trajectory.from_bytes(data)
                self._go_on(trajectory, found, path, from_first=weights == "first")
        except BaseException:
            for file in found:
                file.close()
            raise
        for told in filter(None, (file.told() for file in found)):
            warn(told)

    def _go_on(self, trajectory: Trajectory, found: list[FoundFile], path: str | Path, from_first: bool) -> None:
        run = self._run
        if from_first:  # the weights are replayed, without the rounding that a last interrupted step left behind
            trajectory = trajectory.without_interrupted_end()
        elif trajectory.steps != run.steps:
            raise ValueError(
                f"resume: expected the state (load_state_dict) after step {trajectory.steps}, where {path} ends, got "
                f"an optimizer after step {run.steps}; from the first weights the whole run comes back, without "
                "weights='last' and load_state_dict"
            )
        replay = None
        if trajectory.setups:
            last = trajectory.setups[-1][1]
            if last.method != run.method:
                raise ValueError(f"resume: expected a trajectory of {run.method}, got one of {last.method}")
            run.estimator.check_setup(last)
            if run.ranks is not None and from_first:
                run.ranks.check_directions(last.directions)
            self._warn_of_other_options(last)
            replay = Replay(run.trained.names, trajectory, run.trained.backend, check_values=from_first)
            if from_first:
                self._warn_of_other_thresholds(trajectory.setups[0][1])
        run.on_first(lambda: found[0].set_aside())
        if replay is not None and from_first:
            replay.run()
            self._take_over(replay, last)
        elif replay is not None:
            run.recording.note_versions(self._prepare())
        run.on_first(lambda: run.recording.continue_from(found[0], trajectory))
        if not found:
            run.recording.continue_from(None, trajectory)

    def _take_over(self, replay: Replay, setup: Setup) -> None:
        """Take over the weights and options at the end of the replay."""
        run, trained, trajectory = self._run, self._run.trained, replay.trajectory
        by_name = {name: p for p, name in names.bare(trained.names).items()}
        tables = replay.weights
        anchors = [] if tables is None or tables.anchors is None else tables.anchors
        pairs = [(w.parameter, a) for w, a in zip(tables.weights if tables else (), anchors, strict=False)]
        begun = trajectory.setups[-1][0] < len(trajectory)
        since, losses = (replay.path, replay.dropped, replay.age), replay.anchor_losses
        end = ReplayedEnd(replay.normalizer, *since, pairs, begun, losses)
        now = set(trainable(self._groups))
        ours = {name for name, p in by_name.items() if p in now}
        run.estimator.continue_from(end, setup, ours, self._kept)
        run.steps = trajectory.steps
        run.refused_steps = trajectory.refused_steps
        run.seed, run.directions, trained.drop = setup.seed, setup.directions, setup.drop
        trained.distribution, trained.mask = setup.distribution, setup.mask
        for name, bits in replay.masks.items():
            self._kept[by_name[name]][MASK] = bits
        trained.thresholds = Thresholds.of_trajectory(run.warner, by_name, trajectory)
        trained.weights = None
        run.recording.note_versions(self._prepare())

    def _warn_of_other_options(self, setup: Setup) -> None:
        run = self._run
        kept: dict[str, Any] = {"seed": run.seed, "directions": run.directions, "drop": run.trained.drop}
        kept |= {"distribution": run.trained.distribution, "mask": run.trained.mask}
        changed = {"eps": eps_of(self._groups), "weight_decays": tuple(weight_decays_of(self._groups)[::2])}
        changed |= {"in_place": run.perturbation.name == "in_place", "stochastic": run.trained.rounding != "nearest"}
        for own, what in ((kept, "the run's are taken"), (changed, "the optimizer's are taken from here on")):
            names_of_others = [name for name, value in own.items() if value != getattr(setup, name)]
            if names_of_others:
                options = ", ".join(f"{name} {getattr(setup, name)} (not {own[name]})" for name in names_of_others)
                warn(f"resume: the run had {options}; {what}")

    def _warn_of_other_thresholds(self, setup: Setup) -> None:
        """Warn if this optimizer computes other thresholds from the weights that the run started with."""
        self._prepare()
        trained = self._run.trained
        own = {name: trained.thresholds.get(p) for p, name in names.bare(trained.names).items() if p.requires_grad}
        others = [w for w in setup.weights if w.name in own and own[w.name] != w.threshold]
        if others:
            w = others[0]
            warn(
                f"resume: the run had other thresholds in {len(others)} of {len(setup.weights)} tensors, such as "
                f"{w.threshold} (not {own[w.name]}) in {w.name}, so another sparsity or another rule for ties; the "
                "run's are taken"
            )
