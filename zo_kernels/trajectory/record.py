"""The format of a trajectory: setups, each of which holds until the next, and one record for each step.

A trajectory is 8 bytes of MAGIC, then any number of these records, all numbers little endian:

    crc     uint32   CRC-32 of the rest of the record, continued from the crc of the record before (the first: of MAGIC)
    kind    uint8    `Kind`
    flags   uint8    1: a rate for each parameter group, else one for all; 2: losses are float64, else float32;
                     4: ONE_SIDED alone: one loss at θ for all directions
    count   uint16   STEP, ANCHOR, BETWEEN, ONE_SIDED: directions - 1; else 0
    body             SETUP: uint32 length, then JSON in UTF-8
                     STEP, ANCHOR: rates as float64, then L+ and L- of each direction
                     BETWEEN: rates, then L+ and L- of each direction at θ, then the same at the anchor
                     ONE_SIDED: rates, then L(θ + εz) and L(θ) of each direction; with flag 4 L(θ), then each L(θ + εz)
                     REFUSED, INTERRUPTED: uint32 probes
                     CHECK: uint64, a fingerprint of all weights (`fingerprint.combined`), every 1000 steps

A step of n directions takes 16 + 8 n bytes, a one-sided one 20 + 4 n; a step of MeZO-SVRG between two anchors takes
16 + 16 n.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .difference import ONE_SIDED, TWO_SIDED, Difference
from .setups import Setup, WeightSetup, as_text, from_text

__all__ = ["MAGIC", "MAX_GRADIENT", "Kind", "Record", "RefusedSteps", "Setup", "WeightSetup"]

MAGIC = b"ZOTRAJ1\n"
HEAD = struct.Struct("<IBBH")
LENGTH = struct.Struct("<I")
_FINGERPRINT = struct.Struct("<Q")
RATE_EACH, DOUBLE, COMMON = 1, 2, 4

MAX_GRADIENT = 1e30  # finite in float32 after multiplication with any usual learning rate


class Kind(IntEnum):
    """The kind of a record."""

    SETUP = 0
    STEP = 1  # SPSA
    ANCHOR = 2  # MeZO-SVRG: a full-batch step at a new anchor
    BETWEEN = 3  # MeZO-SVRG: a step between anchors
    REFUSED = 4  # a step that was skipped: it counts, and the weights were restored
    INTERRUPTED = 5  # a step whose closure raised: it does not count, and the weights were restored
    CHECK = 6  # no step, but a fingerprint of the weights
    ONE_SIDED = 7  # SPSA from L(θ + εz) and L(θ)


TAKEN = (Kind.STEP, Kind.ANCHOR, Kind.BETWEEN, Kind.ONE_SIDED)  # kinds with losses
_KINDS = tuple(Kind)


@dataclass(frozen=True, slots=True)
class RefusedSteps:
    """Counts skipped steps over the records of a run. After a skipped anchor, all steps until the next one count, too:
    they change nothing either.
    """

    count: int = 0
    at_anchor: bool = False

    def after(self, record: Record) -> RefusedSteps:
        """The count after one more record."""
        refused = record.refused
        at_anchor = refused if record.kind is Kind.ANCHOR else self.at_anchor
        return RefusedSteps(self.count + (refused or (record.kind is Kind.BETWEEN and at_anchor)), at_anchor)


@dataclass(frozen=True, slots=True)
class Record:
    """One step.

    Attributes:
        step: steps taken before it.
        kind: the kind of step.
        rates: the learning rate of each parameter group; empty if the step was skipped or interrupted.
        losses: (L+, L-) of each direction; of a one-sided step (L(θ + εz), L(θ)).
        anchor_losses: BETWEEN only: (L+, L-) of each direction at the anchor.
        probes: REFUSED and INTERRUPTED only: how many times the weights had been perturbed by then.
        eps: the scale of the perturbation.
    """

    step: int
    kind: Kind
    rates: tuple[float, ...] = ()
    losses: tuple[tuple[float, float], ...] = ()
    anchor_losses: tuple[tuple[float, float], ...] = ()
    probes: int = 0
    eps: float = 0.0

    @property
    def projected_gradients(self) -> list[float]:
        """The projected gradient g of each direction; see `Difference`."""
        return projected_gradients(self.losses, self.difference.span(self.eps))

    @property
    def difference(self) -> Difference:
        """Which losses the pairs hold."""
        return ONE_SIDED if self.kind is Kind.ONE_SIDED else TWO_SIDED

    @property
    def refused(self) -> bool:
        """Whether the step changed nothing because of its losses.

        Such a step has kind REFUSED, except on a GPU: there its kind is written before its losses are known.
        """
        at_anchor = projected_gradients(self.anchor_losses, self.difference.span(self.eps))
        gradients = (*self.projected_gradients, *at_anchor)
        return self.kind is Kind.REFUSED or not all(abs(g) <= MAX_GRADIENT for g in gradients)

    @property
    def loss(self) -> float | None:
        """The mean of the losses at θ ± eps z, or the one at θ of a one-sided step; None if the step has none."""
        flat = [value for pair in self.losses for value in (pair[1:] if self.difference.one_sided else pair)]
        return sum(flat) / len(flat) if flat else None


def projected_gradients(losses: Sequence[tuple[Any, Any]], span: float) -> list[float]:
    """The projected gradient of each pair of losses, which are `span` apart along the direction."""
    return [(there - here) / span for there, here in losses]


class Damaged(ValueError):
    """Bytes that are no whole and sound record."""


class Unknown(Damaged):
    """A record with a correct checksum that this version cannot interpret."""


def encode_setup(setup: Setup, crc: int) -> bytes:
    """Encode a setup as a record; `crc` is that of the record before.

    Raises:
        TypeError, ValueError: the setup could not be read again.
    """
    text = as_text(setup)
    return _seal(Kind.SETUP, 0, 0, LENGTH.pack(len(text)) + text, crc)


def encode(record: Record, crc: int) -> bytes:
    """Encode a step as a record; `crc` is that of the record before."""
    if record.kind in (Kind.REFUSED, Kind.INTERRUPTED):
        return _seal(record.kind, 0, 0, LENGTH.pack(record.probes), crc)
    each = len(set(record.rates)) > 1
    rates = record.rates if each else record.rates[:1]
    losses = [value for pair in (*record.losses, *record.anchor_losses) for value in pair]
    common = record.kind is Kind.ONE_SIDED and len({struct.pack("<d", base) for _, base in record.losses}) == 1
    if common:
        losses = [losses[1], *losses[::2]]
    double = not all(_fits_float32(value) for value in losses)
    body = struct.pack(f"<{len(rates)}d", *rates) + struct.pack(f"<{len(losses)}{'d' if double else 'f'}", *losses)
    flags = RATE_EACH * each | DOUBLE * double | COMMON * common
    return _seal(record.kind, flags, len(record.losses) - 1, body, crc)


def encode_check(fingerprint: str, crc: int) -> bytes:
    """Encode a fingerprint of all weights as a record; `crc` is that of the record before."""
    return _seal(Kind.CHECK, 0, 0, _FINGERPRINT.pack(int(fingerprint, 16)), crc)


def decode_check(data: bytes | bytearray, at: int) -> str:
    """Decode the fingerprint at byte `at`, a record that `check` has accepted."""
    return f"{_FINGERPRINT.unpack_from(data, at + HEAD.size)[0]:016x}"


def _fits_float32(value: float) -> bool:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0] == value
    except OverflowError:
        return False


def _seal(kind: Kind, flags: int, count: int, body: bytes, crc: int) -> bytes:
    head = HEAD.pack(0, kind, flags, count)[4:]
    return LENGTH.pack(zlib.crc32(head + body, crc)) + head + body


def crc_of(data: bytes | bytearray | memoryview, at: int) -> int:
    """The crc of the record that starts at byte `at`."""
    return int(LENGTH.unpack_from(data, at)[0])


def kind_of(data: bytes | bytearray, at: int) -> Kind:
    """The kind of the record that starts at byte `at`."""
    return Kind(HEAD.unpack_from(data, at)[1])


def check(data: bytes | bytearray, at: int, crc: int, groups: int | None) -> tuple[Kind, int]:
    """Check size and checksum of the record at byte `at`; return its kind and the byte where it ends.

    Args:
        crc: that of the record before.
        groups: the number of parameter groups in the setup before, None if there is none.

    Raises:
        Damaged: there is no whole and sound record.
    """
    if len(data) - at < HEAD.size:
        raise Damaged(f"cut off: only {len(data) - at} bytes are left")
    stored, kind, flags, count = HEAD.unpack_from(data, at)
    if kind == Kind.SETUP and len(data) - at < HEAD.size + LENGTH.size:
        raise Damaged("cut off")
    length = LENGTH.unpack_from(data, at + HEAD.size)[0] if kind == Kind.SETUP else 0
    size = size_of(kind, flags, count, groups or 0, length)
    if size is None:
        raise Damaged(f"kind: expected the number of a kind of record, got {kind}")
    end = at + size
    if end > len(data):
        raise Damaged(f"cut off or damaged: it should end at byte {end}, but the file has {len(data)}")
    if zlib.crc32(memoryview(data)[at + 4 : end], crc) != stored:
        raise Damaged("its checksum is wrong")
    if kind != Kind.SETUP and groups is None:
        raise Unknown("expected a setup before it, got none")
    return _KINDS[kind], end


def size_of(kind: int, flags: int, count: int, groups: int, length: int) -> int | None:
    """The bytes of a record, None if there is no such kind; `length` is that of a setup's text."""
    if kind in TAKEN:
        losses = (count + 1) * (4 if kind == Kind.BETWEEN else 2)
        if flags & COMMON & possible_flags(kind):
            losses = count + 2
        return HEAD.size + 8 * (groups if flags & RATE_EACH else 1) + losses * (8 if flags & DOUBLE else 4)
    if kind == Kind.SETUP:
        return HEAD.size + LENGTH.size + length
    if kind in (Kind.REFUSED, Kind.INTERRUPTED):
        return HEAD.size + LENGTH.size
    return HEAD.size + _FINGERPRINT.size if kind == Kind.CHECK else None


def possible_flags(kind: int) -> int:
    """The flags that a record of a kind may have, in one number."""
    if kind not in TAKEN:
        return 0
    return RATE_EACH | DOUBLE | (COMMON if kind == Kind.ONE_SIDED else 0)


def decode_setup(data: bytes | bytearray, at: int, end: int) -> Setup:
    """Decode the setup between bytes `at` and `end`, a record that `check` has accepted.

    Raises:
        Unknown: its text is no setup of this version.
    """
    try:
        return from_text(bytes(data[at + HEAD.size + LENGTH.size : end]))
    except (ValueError, TypeError) as error:
        raise Unknown(str(error)) from error


def decode(data: bytes | bytearray, at: int, end: int, step: int, setup: Setup) -> Record:
    """Decode the step between bytes `at` and `end`, a record that `check` has accepted."""
    _, number, flags, count = HEAD.unpack_from(data, at)
    kind, start = Kind(number), at + HEAD.size
    if kind in (Kind.REFUSED, Kind.INTERRUPTED):
        return Record(step, kind, probes=int(LENGTH.unpack_from(data, start)[0]), eps=setup.eps)
    groups = len(setup.weight_decays)
    rates = struct.unpack_from(f"<{groups if flags & RATE_EACH else 1}d", data, start)
    start += 8 * len(rates)
    code = "d" if flags & DOUBLE else "f"
    flat: Any = struct.unpack(f"<{(end - start) // struct.calcsize(code)}{code}", data[start:end])
    if flags & COMMON & possible_flags(kind):
        pairs = tuple((loss, flat[0]) for loss in flat[1:])
    else:
        pairs = tuple(zip(flat[::2], flat[1::2], strict=True))
    each = rates if len(rates) == groups else rates * groups
    return Record(step, kind, each, pairs[: count + 1], pairs[count + 1 :], eps=setup.eps)
