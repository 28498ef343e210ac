"""A run as a sequence of records, from which the weights of every step can be rebuilt."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

from .. import files
from .faults import Fault, FaultyTrajectory, diagnose, diagnose_beginning
from .order import Order
from .record import (
    MAGIC,
    Damaged,
    Kind,
    Record,
    RefusedSteps,
    Setup,
    Unknown,
    check,
    crc_of,
    decode,
    decode_check,
    decode_setup,
    encode,
    encode_check,
    encode_setup,
    kind_of,
)


class Trajectory(Sequence[Record]):
    """The steps of a run, in a few bytes each; `zo_kernels.replay` turns it and the starting weights into weights.

    A sequence of `Record`. Skipped steps, and steps that the closure interrupted, have records too, since in-place
    perturbation leaves rounding errors in them. `record` describes the bytes.

    Attributes:
        setups: for each setup, in order: the number of records before it, and the setup.
        checks: fingerprints of all weights, one every 1000 steps, by the number of records before each.
        steps: the step count at the end; skipped steps count, interrupted ones do not.
    """

    def __init__(self) -> None:
        self._data = bytearray(MAGIC)
        self._crc = zlib.crc32(MAGIC)
        # Of each step's record: where it begins and ends, and the step count before it.
        self._starts, self._ends, self._at = array("Q"), array("Q"), array("Q")
        self.setups: list[tuple[int, Setup]] = []
        self.checks: dict[int, str] = {}
        self.steps = 0
        self._anchored = False

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        setup = self.setups[bisect_right(self.setups, i, key=lambda each: each[0]) - 1][1]
        return decode(self._data, self._starts[i], self._ends[i], self._at[i], setup)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, Trajectory) else NotImplemented

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        method = f" of {self.setups[0][1].method}" if self.setups else ""
        return f"<Trajectory{method}: {self.steps} steps, {len(self._data)} bytes>"

    @property
    def refused_steps(self) -> int:
        """How many steps were skipped, and changed nothing."""
        refused = RefusedSteps()
        for record in self:
            refused = refused.after(record)
        return refused.count

    def to_bytes(self) -> bytes:
        """The bytes that a file of this trajectory holds."""
        return bytes(self._data)

    @property
    def nbytes(self) -> int:
        """The size of its file."""
        return len(self._data)

    def until(self, steps: int) -> int:
        """How many records come before the first one with at least `steps` steps before it."""
        return next((i for i, at in enumerate(self._at) if at >= steps), len(self))

    def tail(self, start: int) -> bytes:
        """Its bytes from byte `start` on."""
        return bytes(memoryview(self._data)[start:])

    def save(self, path: str | Path) -> None:
        """Write it to a file. A file that exists is replaced, but only once all of the new one is on the disk."""
        files.replace(path, self._data)

    @classmethod
    def load(cls, path: str | Path, *, recover: bool | str = False) -> Trajectory:
        """Read a file that `save` or an optimizer wrote.

        Args:
            recover: "incomplete" ignores the last record if the file ends within it, as a killed process or a full disk
                leaves it. True keeps the longest sound beginning, whatever comes after it.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no trajectory, or of a newer version, or has an incomplete or damaged record that
                `recover` does not cover; the message names the record, the byte, and what to do.
        """
        return cls.from_bytes(files.read(path), recover=recover, path=path)

    @classmethod
    def from_bytes(cls, data: bytes, *, recover: bool | str = False, path: str | Path = "trajectory") -> Trajectory:
        """As `load`, from the bytes of a file; `path` is for messages."""
        if not (isinstance(recover, bool) or recover == "incomplete"):
            raise ValueError(f"recover: expected False, 'incomplete' or True, got {recover!r}")
        result, _, fault = read(data)
        if fault is not None:
            ignored = fault.kind == "incomplete" if recover == "incomplete" else recover and fault.recoverable
            if not ignored:
                raise FaultyTrajectory.of(fault, path, result.steps)
        return result

    def _take(self, at: int, order: Order | None = None) -> int:
        """Register the record at byte `at`, and return where it ends; with `order`, check that it may come there."""
        setup = self.setups[-1][1] if self.setups else None
        kind, end = check(self._data, at, self._crc, None if setup is None else len(setup.weight_decays))
        what: Setup | str | None = None
        if order is not None and kind is not Kind.SETUP:
            order.comes(kind, self._data, at)
        if kind is Kind.SETUP:
            what = setup = decode_setup(self._data, at, end)
            if order is not None:
                order.setup_comes(setup, self.steps, len(self))
        elif kind is Kind.CHECK:
            what = decode_check(self._data, at)
        for note in self._noting(kind, at, end, crc_of(self._data, at), what):
            note()
        return end

    def _noting(self, kind: Kind, at: int, end: int, crc: int, what: Setup | str | None) -> list[Callable[[], object]]:
        """The calls of C functions that register a record.

        Args:
            what: the setup or fingerprint in it, None for a step.
        """
        here = partial(setattr, self, "_crc", crc)
        if isinstance(what, Setup):
            anchored = partial(setattr, self, "_anchored", what.anchored)
            taken = partial(self.setups.append, (len(self), what))
            return [taken, partial(setattr, self, "steps", what.step), anchored, here]
        if what is not None:
            return [partial(self.checks.__setitem__, len(self), what), here]
        steps = self.steps + (kind is not Kind.INTERRUPTED)
        return [
            partial(self._starts.append, at),
            partial(self._ends.append, end),
            partial(self._at.append, self.steps),
            partial(setattr, self, "steps", steps),
            partial(setattr, self, "_anchored", self._anchored or kind is Kind.ANCHOR),
            here,
        ]

    def without_interrupted_end(self) -> Trajectory:
        """The trajectory without interrupted steps at its end, which do not count."""
        end = len(self._data)
        for start, stop in zip(reversed(self._starts), reversed(self._ends), strict=True):
            if stop != end or kind_of(self._data, start) is not Kind.INTERRUPTED:
                break
            end = start
        return self if end == len(self._data) else self.from_bytes(bytes(self._data[:end]))

    def add_setup(self, setup: Setup) -> None:
        """Append a setup, which holds for the records after it."""
        _make(self.adding_setup(setup))

    def add(self, record: Record) -> None:
        """Append a step. Its `step` and `eps` are ignored: those of the trajectory hold."""
        _make(self.adding(record))

    def may_go_on(self, setup: Setup) -> bool:
        """Whether a file with this setup after the present records can be read again."""
        order = Order()
        order.setup, order.anchored = (self.setups[-1][1] if self.setups else None), self._anchored
        try:
            order.setup_comes(setup, self.steps, len(self))
        except Unknown:
            return False
        return True

    def adding_setup(self, setup: Setup) -> list[Callable[[], object]]:
        """The calls that append a setup; see `adding`."""
        return self._appending(Kind.SETUP, encode_setup(setup, self._crc), setup)

    def adding_check(self, fingerprint: str) -> list[Callable[[], object]]:
        """The calls that append a fingerprint of all weights after the last step; see `adding`."""
        return self._appending(Kind.CHECK, encode_check(fingerprint, self._crc), fingerprint)

    def adding(self, record: Record) -> list[Callable[[], object]]:
        """The calls of C functions that append a step, to be made together with the step itself (`at_once`)."""
        return self._appending(record.kind, encode(replace(record, step=self.steps), self._crc), None)

    def _appending(self, kind: Kind, data: bytes, what: Setup | str | None) -> list[Callable[[], object]]:
        at = len(self._data)
        notes = self._noting(kind, at, at + len(data), crc_of(data, 0), what)
        return [partial(self._data.extend, data), *notes]


def _make(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def read(data: bytes) -> tuple[Trajectory, int, Fault | None]:
    """Read the longest sound beginning of a trajectory; every record in it has been checked.

    Returns:
        The trajectory, how many bytes of `data` it covers, and the fault after them, None if there is none.
    """
    result = Trajectory()
    if (fault := diagnose_beginning(data)) is not None:
        return result, 0, fault
    result._data = bytearray(data)
    order, at, records = Order(), len(MAGIC), 0
    try:
        while at < len(data):
            at = result._take(at, order)
            records += 1
    except Damaged as error:
        fault = diagnose(data, at, result._crc, order, records, error)
        del result._data[at:]
    return result, at, fault
