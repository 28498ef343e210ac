"""Going on with a run that was cut off."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from .. import names
from ..trajectory import Setup, Trajectory
from ..trajectory.file import FoundFile
from .replay import Replay
from ..warn import warn

if TYPE_CHECKING:
    from .recorded import RecordedSteps


def resume_from(
    optimizer: RecordedSteps, trajectory: Trajectory, found: list[FoundFile], path: str | FilePath, weights: str
) -> None:
    """As `resume`. All is checked, and what is not sound of the file is copied, before anything is changed."""
    if weights == "first":  # what an interrupted step left of its rounding went with the process
        trajectory = trajectory.without_interrupted_end()
    if weights == "last" and trajectory.steps != optimizer.step_count:
        raise ValueError(
            f"resume: expected the state (load_state_dict) after step {trajectory.steps}, where {path} ends, got "
            f"an optimizer after step {optimizer.step_count}; from the first weights the whole run comes back, without "
            "weights='last' and load_state_dict"
        )
    replay = None
    if trajectory.setups:
        last = trajectory.setups[-1][1]
        if last.method != type(optimizer).__name__:
            raise ValueError(f"resume: expected a trajectory of {type(optimizer).__name__}, got one of {last.method}")
        if optimizer._ranks is not None and weights == "first":
            optimizer._ranks.check_directions(last.directions)
        _warn_of_other_options(optimizer, last)
        replay = Replay(optimizer._names, trajectory, optimizer.backend, check_values=weights == "first")
        if weights == "first":
            _warn_of_other_thresholds(optimizer, trajectory.setups[0][1])
    optimizer._by_first(lambda: found[0].set_aside())
    if replay is not None and weights == "first":
        replay.run()
        optimizer._go_on_from(replay, last)
    elif replay is not None:
        optimizer._recording.note_versions(optimizer._prepare())
    optimizer._by_first(lambda: optimizer._recording.go_on(found[0], trajectory))
    if not found:
        optimizer._recording.go_on(None, trajectory)


def _warn_of_other_options(optimizer: RecordedSteps, setup: Setup) -> None:
    """Of a run that is gone on with."""
    kept = {"seed": optimizer.seed, "directions": optimizer.directions, "drop": optimizer.drop}
    changed = {"eps": optimizer._eps(), "weight_decays": tuple(optimizer._weight_decays()[::2])}
    changed |= {"in_place": optimizer.perturb == "in_place", "stochastic": optimizer.rounding != "nearest"}
    for own, what in ((kept, "the run's are taken"), (changed, "the optimizer's are taken from here on")):
        names_of_others = [name for name, value in own.items() if value != getattr(setup, name)]
        if names_of_others:
            told = ", ".join(f"{name} {getattr(setup, name)} (not {own[name]})" for name in names_of_others)
            warn(f"resume: the run had {told}; {what}")


def _warn_of_other_thresholds(optimizer: RecordedSteps, setup: Setup) -> None:
    """While the weights are those that the run started with, so that equal options give equal thresholds."""
    optimizer._prepare()
    own = {name: optimizer._thresholds.get(p) for p, name in names.bare(optimizer._names).items() if p.requires_grad}
    others = [w for w in setup.weights if w.name in own and own[w.name] != w.threshold]
    if others:
        w = others[0]
        warn(
            f"resume: the run had other thresholds in {len(others)} of {len(setup.weights)} tensors, such as "
            f"{w.threshold} (not {own[w.name]}) in {w.name}, so another sparsity or another rule for ties; the run's "
            "are taken"
        )
