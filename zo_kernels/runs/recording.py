"""Between an optimizer and its trajectory: when a setup is due, and whether weights are those of the last step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backends.pending import Pending
from ..closures.resolution import Resolution
from ..interrupts import Call, at_once
from ..trajectory import Kind, Record, Setup, Trajectory
from ..trajectory.fingerprint import as_text
from ..trajectory.record import RefusedSteps, WeightSetup, encode_setup
from ..trajectory.recorder import FoundFile, Recorder
from ..warn import Warner, warn
from ..weights.fingerprints import combined_fingerprint, fingerprints
from ..weights.tables import Weights

CHECK_EVERY = 1000  # steps; a check costs about as much as a pass


class _Log:
    """A recorder, and the steps whose losses are not known to it yet."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.pending = recorder, Pending()
        self.steps = recorder.trajectory.steps  # pending ones included
        self.unseen = RefusedSteps()  # of the steps of which only their losses tell it

    def adding(self, record: Record, losses: Tensor | None, arriving: Callable[[Record], Call]) -> list[Call]:
        """What appends a step.

        Args:
            arriving: makes a call for when its losses are known, should they be on a device.
        """
        counted = partial(setattr, self, "steps", self.steps + (record.kind is not Kind.INTERRUPTED))
        if losses is None:
            self.pending.work_off(wait=True)
            return [*self.recorder.trajectory.adding(record), counted]
        n = len(record.losses)

        def then(flat: list[float]) -> list[Call]:
            pairs = tuple(zip(flat[::2], flat[1::2], strict=True))
            whole = replace(record, losses=pairs[:n], anchor_losses=pairs[n:])
            unseen = partial(setattr, self, "unseen", self.unseen.after(whole))
            return [*self.recorder.trajectory.adding(whole), unseen, arriving(whole)]

        return [self.pending.putting(losses, then), counted]

    def settle(self, *, wait: bool = True) -> None:
        """Write down what is known; with `wait`, all."""
        self.pending.work_off(wait=wait)
        self.recorder.write()

    def close(self) -> None:
        """At the end of the run, or of the process, when nobody can catch an error any more."""
        path = self.recorder.path
        try:
            try:
                self.pending.work_off(wait=True)
                if not self.recorder.lost:
                    self.recorder.write()
            finally:
                self.recorder.close()
        except (OSError, RuntimeError) as error:
            warn(f"{path}: the end of the trajectory may not be there, or not on the disk: {error}")


class _Versions:
    """A count of the changes of each weight, as it was last noted; tensors made in inference mode have none."""

    def __init__(self) -> None:
        self._now: tuple[Weights, list[int]] | None = None
        self._before: dict[Tensor, int] = {}  # of tensors that others had

    def note(self, weights: Weights) -> None:
        if self._now is not None and weights is not self._now[0]:
            self._before = self._all()
        self._now = weights, weights.versions()

    def differ(self, weights: Weights) -> bool:
        """Whether one of its tensors was changed since it was noted."""
        if self._now is not None and weights is self._now[0]:
            return self._now[1] != weights.versions()
        known = self._all()
        return any(known.get(t, v) != v for t, v in zip(weights.counted, weights.versions(), strict=True))

    def _all(self) -> dict[Tensor, int]:
        if self._now is None:
            return self._before
        weights, noted = self._now
        return {**self._before, **dict(zip(weights.counted, noted, strict=True))}


class Recording:
    """A run's trajectory as it grows. Of steps on a GPU it learns the losses later, without waiting for them, and at
    the latest when somebody asks, or the process ends.

    Args:
        sync: see `ZeroOrderOptimizer`.
        warner: what is wrong with losses is said there.

    Attributes:
        changed: whether others had changed weights when the last step began.
        changed_from_outside: whether the steps that are being taken began with weights that others had set.
    """

    _cut = False  # whether a setup says that the weights are others than the records before it lead to
    _warned = False
    _checked = -1  # the steps after which the last check was made

    def __init__(self, sync: str, warner: Warner) -> None:
        self._sync = sync
        self._resolution = Resolution(warner)
        self._begin_log(Recorder(sync))
        self._versions: _Versions | None = None  # after the last step that a weight took part in
        self._key: Any = None
        self.changed = self.changed_from_outside = False

    def _begin_log(self, recorder: Recorder) -> None:
        self._log = _Log(recorder)
        weakref.finalize(self, self._log.close)

    @property
    def trajectory(self) -> Trajectory:
        """What there is so far, whether or not it can be written."""
        self._log.pending.work_off(wait=True)
        with suppress(OSError, RuntimeError):  # the next step says it
            self._log.recorder.write()
        return self._log.recorder.trajectory

    @property
    def path(self) -> Path | None:
        """Of the file that it is written to."""
        return self._log.recorder.path

    @property
    def has_begun(self) -> bool:
        """Whether a step was appended before, so that another can be."""
        return self._versions is not None and bool(self._log.recorder.trajectory.setups)

    @property
    def refused_unseen(self) -> int:
        """Steps that were refused without anybody having been told."""
        self._log.pending.work_off(wait=True)
        return self._log.unseen.count

    def write_to(self, path: str | Path) -> None:
        """See `ZeroOrderOptimizer.record_to`."""
        self._log.pending.work_off(wait=True)  # what the file before could not take goes to this one
        self._log.recorder.write_to(path)

    def go_on(self, found: FoundFile | None, trajectory: Trajectory) -> None:
        """With a file of which `trajectory` is the sound beginning, or without one."""
        self._begin_log(Recorder.resumed(found, trajectory, self._sync))
        self._cut = not all(setup.continues for _, setup in trajectory.setups)

    def write(self) -> None:
        """Write down what is known."""
        self._log.settle(wait=False)

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

        Raises:
            ValueError: losses that have come from a GPU since are too coarse; see `Resolution`.
        """
        self._resolution.look()
        changed = self.changed = self.changed_by_others(weights)
        continues = self._versions is not None and not changed
        if self._key == key and continues:
            return
        if self._key == key and changed and self._cut:  # a replay does not come here, so another setup serves nobody
            self.changed_from_outside = True
            return
        self._log.settle()
        due = setup(continues or not len(self.trajectory))
        if not self.trajectory.may_go_on(due):  # better a trajectory that ends here than one that nobody can read
            due = replace(due, continues=False)
        at_once(self._log.recorder.trajectory.adding_setup(due))
        self._log.recorder.write()
        self.changed_from_outside = not due.continues
        self._key = key
        self._cut |= not due.continues
        if changed and not due.continues and not self._warned:
            self._warned = True
            warn(
                f"something else than the optimizer changed the weights after step {due.step} (clamp_, copy_, an "
                f"average swapped in, weights loaded): the trajectory gives the weights up to there (upto={due.step}) "
                "and not of the steps to come. To note it took "
                f"{len(encode_setup(due, 0))} bytes; later changes are not noted"
                + ("; MeZO-SVRG takes a new anchor after each" if due.svrg else "")
            )

    def begin_anew(self, setup: Callable[[bool], Setup]) -> None:
        """In the middle of a step, whose closure has written to weights: a replay does not come here."""
        if not self._cut:
            self._log.settle()
            noted = partial(setattr, self, "_cut", True)
            at_once([*self._log.recorder.trajectory.adding_setup(setup(False)), noted])
            self._log.recorder.write()

    def adding(self, record: Record, losses: Tensor | None = None) -> list[Call]:
        """What appends a step that was taken, refused or interrupted; to be called with the pass that takes it.
        `added` is to follow, and may follow more than once.

        Args:
            losses: the record's, (L+, L-) of each pair one after the other, if they are on a device; the record's own
                are then not looked at.

        Raises:
            Refused: losses on the host are too coarse; see `Resolution`.
        """
        if losses is None:
            self._resolution.look_at(record)
        return self._log.adding(record, losses, self._resolution.arriving)

    def added(self, record: Record, weights: Weights) -> None:
        """Write down what is known, and from time to time what the weights are."""
        log = self._log
        log.settle(wait=False)
        due = record.losses and log.steps % CHECK_EVERY == 0 and log.steps == record.step + 1
        if due and self._checked != log.steps:
            total = combined_fingerprint(weights.shards).reshape(1)
            put = log.pending.putting(total, lambda v: log.recorder.trajectory.adding_check(as_text(v[0])))
            at_once([put, partial(setattr, self, "_checked", log.steps)])
            log.settle(wait=False)

    def note_versions(self, weights: Weights) -> None:
        """What was changed up to now was changed by the optimizer."""
        self._versions = self._versions or _Versions()
        self._versions.note(weights)

    def forget_versions(self) -> _Versions | None:
        """The weights may be others from now on; returns what `restore_versions` takes."""
        known, self._versions = self._versions, None
        return known

    def restore_versions(self, known: _Versions | None) -> None:
        """They are not, after all."""
        self._versions = known

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
