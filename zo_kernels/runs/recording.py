"""Writes a run to its trajectory, and notices weights that something other than the optimizer changed."""

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
    """A recorder, and the steps whose losses have not arrived from a device yet."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.pending = recorder, Pending()
        self.steps = recorder.trajectory.steps  # pending ones included
        self.unseen = RefusedSteps()  # of the steps that a device skipped, as their losses show

    def adding(self, record: Record, losses: Tensor | None, on_arrival: Callable[[Record], Call]) -> list[Call]:
        """Return the calls that append a step.

        Args:
            losses: the losses, if they are on a device; the step is appended when they have arrived.
            on_arrival: makes one more call to make then.
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
            return [*self.recorder.trajectory.adding(whole), unseen, on_arrival(whole)]

        return [self.pending.putting(losses, then), counted]

    def settle(self, *, wait: bool = True) -> None:
        """Write the steps whose losses have arrived; with `wait`, all steps."""
        self.pending.work_off(wait=wait)
        self.recorder.write()

    def close(self) -> None:
        """Write what is left and close the file. The run or the process ends, so errors become warnings."""
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
    """PyTorch's version counters of the weights, as last noted. Tensors made in inference mode have no counter."""

    def __init__(self) -> None:
        self._now: tuple[Weights, list[int]] | None = None
        self._before: dict[Tensor, int] = {}  # of the tensors of earlier tables

    def note(self, weights: Weights) -> None:
        if self._now is not None and weights is not self._now[0]:
            self._before = self._all()
        self._now = weights, weights.versions()

    def differ(self, weights: Weights) -> bool:
        """Say whether one of these weights has changed since its counter was noted."""
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
    """Appends the steps of a run to its trajectory.

    Losses on a GPU are not waited for: a step is appended when they have arrived, and at the latest when somebody reads
    the trajectory or the process ends.

    Args:
        sync: see `ZeroOrderOptimizer`.
        warner: reports losses that are too coarse.

    Attributes:
        changed: whether something other than the optimizer had changed weights when the last step began.
        changed_from_outside: whether the current setup says that it does not continue from the records before it.
    """

    _cut = False  # whether a setup does not continue from the records before it, so that a replay ends there
    _warned = False
    _checked = -1  # the step count at the last fingerprint

    def __init__(self, sync: str, warner: Warner) -> None:
        self._sync = sync
        self._resolution = Resolution(warner)
        self._begin_log(Recorder(sync))
        self._versions: _Versions | None = None  # noted after each step
        self._key: Any = None
        self.changed = self.changed_from_outside = False

    def _begin_log(self, recorder: Recorder) -> None:
        self._log = _Log(recorder)
        weakref.finalize(self, self._log.close)

    @property
    def trajectory(self) -> Trajectory:
        """All steps so far, also if they cannot be written to the file."""
        self._log.pending.work_off(wait=True)
        with suppress(OSError, RuntimeError):  # the next step raises it
            self._log.recorder.write()
        return self._log.recorder.trajectory

    @property
    def path(self) -> Path | None:
        """The path of the file; None if there is none."""
        return self._log.recorder.path

    @property
    def has_begun(self) -> bool:
        """Whether a step was appended before, so that an interrupted one can be."""
        return self._versions is not None and bool(self._log.recorder.trajectory.setups)

    @property
    def refused_unseen(self) -> int:
        """How many steps a device skipped, without an exception."""
        self._log.pending.work_off(wait=True)
        return self._log.unseen.count

    def write_to(self, path: str | Path) -> None:
        """See `ZeroOrderOptimizer.record_to`."""
        self._log.pending.work_off(wait=True)  # this file then also takes steps that could not be written to the last
        self._log.recorder.write_to(path)

    def continue_from(self, found: FoundFile | None, trajectory: Trajectory) -> None:
        """Continue a trajectory, the sound beginning of a file. `found` is the file, None where another rank has it."""
        self._begin_log(Recorder.resumed(found, trajectory, self._sync))
        self._cut = not all(setup.continues for _, setup in trajectory.setups)

    def write(self) -> None:
        """Write the steps whose losses have arrived."""
        self._log.settle(wait=False)

    def sync(self) -> None:
        """Write all steps and force them to the disk, unless the option `sync` is "never"."""
        self._log.settle()
        self._log.recorder.sync()

    def begin(self, key: Any, setup: Callable[[bool], Setup], weights: Weights) -> None:
        """Begin a step: append a setup if one is due.

        Args:
            key: changes whenever the setup changes.
            setup: makes a setup; its argument says whether the weights are those that the records so far lead to.
            weights: the tables of the step.

        Raises:
            ValueError: losses that have arrived from a GPU are too coarse; see `Resolution`.
        """
        self._resolution.check_arrived()
        changed = self.changed = self.changed_by_others(weights)
        continues = self._versions is not None and not changed
        if self._key == key and continues:
            return
        if self._key == key and changed and self._cut:  # replays end before this: nobody would read another setup
            self.changed_from_outside = True
            return
        self._log.settle()
        due = setup(continues or not len(self.trajectory))
        if not self.trajectory.may_go_on(due):  # a setup that does not fit would make the file unreadable
            due = replace(due, continues=False)
        at_once(self._log.recorder.trajectory.adding_setup(due))
        self._log.recorder.write()
        self.changed_from_outside = not due.continues
        self._key = key
        self._cut |= not due.continues
        if changed and not due.continues and not self._warned:
            self._warned = True
            warn(
                f"something other than the optimizer changed the weights after step {due.step} (clamp_, copy_, an "
                f"average swapped in, weights loaded): the trajectory gives the weights up to there (upto={due.step}), "
                "but not those of later steps. The note of this change takes "
                f"{len(encode_setup(due, 0))} bytes; later changes are not noted"
                + ("; MeZO-SVRG takes a new anchor after each" if due.svrg else "")
            )

    def cut(self, setup: Callable[[bool], Setup]) -> None:
        """End the replayable part, in the middle of a step whose closure has written to weights."""
        if not self._cut:
            self._log.settle()
            noted = partial(setattr, self, "_cut", True)
            at_once([*self._log.recorder.trajectory.adding_setup(setup(False)), noted])
            self._log.recorder.write()

    def adding(self, record: Record, losses: Tensor | None = None) -> list[Call]:
        """Return the calls that append a step that was taken, skipped or interrupted.

        The pass that takes the step makes these calls. Then call `added`; it can be called repeatedly.

        Args:
            losses: if the losses are on a device, all of them, as L+, L-, L+, ...; they replace those of the record.

        Raises:
            Refused: losses on the host are too coarse; see `Resolution`.
        """
        if losses is None:
            self._resolution.check(record)
        return self._log.adding(record, losses, self._resolution.on_arrival)

    def added(self, record: Record, weights: Weights) -> None:
        """Write the steps whose losses have arrived, and every 1000 steps a fingerprint of the weights."""
        log = self._log
        log.settle(wait=False)
        due = record.losses and log.steps % CHECK_EVERY == 0 and log.steps == record.step + 1
        if due and self._checked != log.steps:
            total = combined_fingerprint(weights.shards).reshape(1)
            put = log.pending.putting(total, lambda v: log.recorder.trajectory.adding_check(as_text(v[0])))
            at_once([put, partial(setattr, self, "_checked", log.steps)])
            log.settle(wait=False)

    def note_versions(self, weights: Weights) -> None:
        """Note the weights' version counters: all changes so far count as the optimizer's."""
        self._versions = self._versions or _Versions()
        self._versions.note(weights)

    def forget_versions(self) -> _Versions | None:
        """Forget the version counters, since other weights may be loaded; return them, for `restore_versions`."""
        known, self._versions = self._versions, None
        return known

    def restore_versions(self, known: _Versions | None) -> None:
        """Undo `forget_versions`."""
        self._versions = known

    def changed_by_others(self, weights: Weights) -> bool:
        """Say whether something other than the optimizer has changed weights since the last step."""
        return self._versions is not None and self._versions.differ(weights)

    def __getstate__(self) -> dict[str, Any]:
        # The tensors of a copy have version counters of their own.
        self._log.settle()
        return {**self.__dict__, "_key": None, "_versions": self._versions and _Versions()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, self._log.close)


def weight_setups(weights: Weights, names: Mapping[Tensor, str]) -> tuple[WeightSetup, ...]:
    """Return the part of a setup that describes the weights."""
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
