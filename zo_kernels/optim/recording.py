"""Between an optimizer and its trajectory: when a setup is due, and whether weights are those of the last step."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..trajectory import Kind, Record, Setup, Trajectory
from ..trajectory.file import FoundFile
from ..trajectory.fingerprint import as_text
from ..trajectory.record import RefusedSteps, WeightSetup
from ..trajectory.recorder import Recorder
from .pending import Pending
from .weights import Weights
from .whole import combined_fingerprint, fingerprints

CHECK_EVERY = 1000  # steps; a check costs about as much as a pass


class _Log:
    """A recorder, and the steps whose losses are not known to it yet."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.pending = recorder, Pending()
        self.steps = recorder.trajectory.steps  # pending ones included
        self.unseen = RefusedSteps()  # of the steps of which only their losses tell it

    def add(self, record: Record, losses: Tensor | None) -> None:
        self.steps += record.kind is not Kind.INTERRUPTED
        if losses is None:
            self.settle()
            self.recorder.add(record)
            return
        n = len(record.losses)

        def then(flat: list[float]) -> None:
            pairs = tuple(zip(flat[::2], flat[1::2], strict=True))
            whole = replace(record, losses=pairs[:n], anchor_losses=pairs[n:])
            self.unseen.add(whole)
            self.recorder.add(whole)

        self.pending.put(losses, then)
        self.pending.work_off(wait=False)

    def settle(self) -> None:
        self.pending.work_off(wait=True)

    def close(self) -> None:
        """At the end of the run, or of the process."""
        try:
            self.settle()
        finally:
            self.recorder.close()


class _Versions:
    """A count of the changes of each weight, as it was last noted; tensors made in inference mode have none."""

    def __init__(self) -> None:
        self._weights: Weights | None = None  # of whose tensors these are
        self._noted: list[int] = []
        self._before: dict[Tensor, int] = {}  # of tensors that others had

    def note(self, weights: Weights) -> None:
        if weights is not self._weights:
            self._before = self._all()
            self._weights = weights
        self._noted = weights.versions()

    def differ(self, weights: Weights) -> bool:
        """Whether one of its tensors was changed since it was noted."""
        if weights is self._weights:
            return self._noted != weights.versions()
        known = self._all()
        return any(known.get(t, v) != v for t, v in zip(weights.counted, weights.versions(), strict=True))

    def _all(self) -> dict[Tensor, int]:
        if self._weights is None:
            return self._before
        return {**self._before, **dict(zip(self._weights.counted, self._noted, strict=True))}


class Recording:
    """A run's trajectory as it grows. Of steps on a GPU it learns the losses later, without waiting for them, and at
    the latest when somebody asks, or the process ends.

    Args:
        sync: see `ZeroOrderOptimizer`.

    Attributes:
        setup_told: the setup of the steps that are being taken, as texts.
    """

    def __init__(self, sync: str) -> None:
        self._sync = sync
        self._begin_log(Recorder(sync))
        self._versions: _Versions | None = None  # after the last step that a weight took part in
        self._key: Any = None
        self.setup_told: list[str] = []

    def _begin_log(self, recorder: Recorder) -> None:
        self._log = _Log(recorder)
        weakref.finalize(self, self._log.close)

    @property
    def trajectory(self) -> Trajectory:
        """What there is so far."""
        self._log.settle()
        return self._log.recorder.trajectory

    @property
    def path(self) -> Path | None:
        """Of the file that it is written to."""
        return self._log.recorder.path

    @property
    def refused_unseen(self) -> int:
        """Steps that were refused without anybody having been told."""
        self._log.settle()
        return self._log.unseen.count

    def write_to(self, path: str | Path) -> None:
        """See `ZeroOrderOptimizer.record_to`."""
        self._log.settle()
        self._log.recorder.write_to(path)

    def go_on(self, found: FoundFile | None, trajectory: Trajectory) -> None:
        """With a file of which `trajectory` is the sound beginning, or without one."""
        self._begin_log(Recorder.resumed(found, trajectory, self._sync))

    def sync(self) -> None:
        """Force what was recorded to the disk, unless that is never to be done."""
        self._log.settle()
        self._log.recorder.sync()

    def begin(self, key: Any, setup: Callable[[bool], Setup], weights: Weights) -> None:
        """Before every step: append a setup if one is due.

        Args:
            key: stands for all that it says.
            setup: makes it, told whether the weights are those that the records before it lead to.
            weights: of the step.
        """
        continues = self._versions is not None and not self.changed_by_others(weights)
        if self._key != key or not continues:
            self._log.settle()
            due = setup(continues or not len(self.trajectory))
            self._log.recorder.add_setup(due)
            self.setup_told = _told(due)
            self._key = key

    def took(self, record: Record, weights: Weights, losses: Tensor | None = None) -> None:
        """Append a step that was taken, refused or interrupted.

        Args:
            losses: the record's, (L+, L-) of each pair one after the other, if they are on a device; the record's own
                are then not looked at.
        """
        self.note_versions(weights)
        self._log.add(record, losses)
        if self._log.steps % CHECK_EVERY == 0 and record.losses:
            total = combined_fingerprint(weights.shards)
            recorder = self._log.recorder
            self._log.pending.put(total.reshape(1), lambda value: recorder.add_check(as_text(value[0])))
            self._log.pending.work_off(wait=False)

    def note_versions(self, weights: Weights) -> None:
        """What was changed up to now was changed by the optimizer."""
        self._versions = self._versions or _Versions()
        self._versions.note(weights)

    def forget_versions(self) -> None:
        """The weights may be others from now on."""
        self._versions = None

    def changed_by_others(self, weights: Weights) -> bool:
        """Whether somebody has loaded or set weights since the last step."""
        return self._versions is not None and self._versions.differ(weights)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the tensors count their own changes, from anew.
        self._log.settle()
        return {**self.__dict__, "_key": None, "_versions": self._versions and _Versions()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, self._log.close)


def _told(setup: Setup) -> list[str]:
    """What does not follow from the weights' values, which are compared by themselves."""
    told = {field.name: getattr(setup, field.name) for field in fields(setup) if field.name != "step"}
    trained = [replace(w, fingerprint="", threshold=None) for w in told.pop("weights")]
    told["weights changed from outside"] = not told.pop("continues")
    told["names and shapes of the weights, as a digest:"] = hashlib.blake2s(repr(trained).encode()).hexdigest()[:16]
    return [f"{name} {value}" for name, value in told.items()]


def weight_setups(weights: Weights, names: Mapping[Tensor, str]) -> tuple[WeightSetup, ...]:
    """The weights' part of a setup."""
    return tuple(
        WeightSetup(
            names[w.parameter],
            w.shard.whole,
            str(w.tensor.dtype).removeprefix("torch."),
            w.param_id,
            w.row,
            w.block,
            w.threshold,
            print_of_it,
        )
        for w, print_of_it in zip(weights.weights, fingerprints(weights.shards), strict=True)
    )
