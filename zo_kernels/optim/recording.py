"""Between an optimizer and its trajectory: when a setup is due, and whether weights are those of the last step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..trajectory import Record, Setup, Trajectory
from ..trajectory.fingerprint import combined, fingerprint
from ..trajectory.record import WeightSetup
from ..trajectory.recorder import Recorder
from .weights import Weights

CHECK_EVERY = 1000  # steps; a check costs about as much as a pass


class Recording:
    """A run's trajectory as it grows."""

    def __init__(self) -> None:
        self._recorder = Recorder()
        self._versions: dict[Tensor, int] | None = None  # of each weight after the last step that it took part in
        self._key: Any = None

    @property
    def trajectory(self) -> Trajectory:
        """What there is so far."""
        return self._recorder.trajectory

    def write_to(self, path: str | Path) -> None:
        """See `ZeroOrderOptimizer.record_to`."""
        self._recorder.write_to(path)

    def go_on(self, path: str | Path, trajectory: Trajectory) -> None:
        """With a file of which `trajectory` is the sound beginning."""
        self._recorder = Recorder.resumed(path, trajectory)

    def begin(self, key: Any, setup: Callable[[bool], Setup], weights: Weights) -> None:
        """Before every step: append a setup if one is due.

        Args:
            key: stands for all that it says.
            setup: makes it, told whether the weights are those that the records before it lead to.
            weights: of the step.
        """
        continues = self._versions is not None and not self.changed_by_others(weights)
        if self._key != key or not continues:
            self._recorder.add_setup(setup(continues or not len(self.trajectory)))
            self._key = key

    def took(self, record: Record, weights: Weights) -> None:
        """Append a step that was taken, refused or interrupted."""
        self.note_versions(weights)
        self._recorder.add(record)
        if self.trajectory.steps % CHECK_EVERY == 0 and record.losses:
            self._recorder.add_check(combined([fingerprint(w.tensor) for w in weights.weights]))

    def note_versions(self, weights: Weights) -> None:
        """What was changed up to now was changed by the optimizer."""
        self._versions = {**(self._versions or {}), **_versions(weights)}

    def forget_versions(self) -> None:
        """The weights may be others from now on."""
        self._versions = None

    def changed_by_others(self, weights: Weights) -> bool:
        """Whether somebody has loaded or set weights since the last step."""
        known = self._versions or {}
        return any(known.get(t, version) != version for t, version in _versions(weights).items())

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the tensors count their own changes, from anew.
        return {**self.__dict__, "_key": None, "_versions": None if self._versions is None else {}}


def _versions(weights: Weights) -> dict[Tensor, int]:
    """A count of the changes of each weight (tensors made in inference mode have none)."""
    return {w.tensor: 0 if w.tensor.is_inference() else w.tensor._version for w in weights.weights}


def weight_setups(weights: Weights, names: Mapping[Tensor, str]) -> tuple[WeightSetup, ...]:
    """The weights' part of a setup."""
    return tuple(
        WeightSetup(
            names[w.tensor],
            tuple(w.tensor.shape),
            str(w.tensor.dtype).removeprefix("torch."),
            w.param_id,
            w.row,
            w.block,
            w.threshold,
            fingerprint(w.tensor),
        )
        for w in weights.weights
    )
