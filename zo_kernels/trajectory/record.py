"""What a trajectory is made of: setups, which hold until the next, and a record for each step.

Bytes of a trajectory (little endian): 8 of MAGIC, then any number of

    crc     uint32   CRC-32 of the rest, continued from the crc of the record before (of MAGIC for the first)
    kind    uint8    `Kind`
    flags   uint8    1: a rate for each parameter group, else one for all; 2: losses are float64, else float32
    count   uint16   STEP, ANCHOR, BETWEEN: directions - 1; else 0
    body             SETUP: uint32 length, then JSON in UTF-8
                     STEP, ANCHOR: rates as float64, then L+ and L- of each direction
                     BETWEEN: rates, then L+ and L- of each direction at θ, then the same at the anchor
                     REFUSED, INTERRUPTED: uint32 probes
                     CHECK: uint64, a fingerprint of all weights (`fingerprint.combined`), every 1000 steps

A step of n directions takes 16 + 8 n bytes; between two anchors of MeZO-SVRG, 16 + 16 n.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .setups import Setup, WeightSetup, as_text, from_text

__all__ = ["MAGIC", "MAX_GRADIENT", "Kind", "Record", "RefusedSteps", "Setup", "WeightSetup"]

MAGIC = b"ZOTRAJ1\n"
HEAD = struct.Struct("<IBBH")
LENGTH = struct.Struct("<I")
_FINGERPRINT = struct.Struct("<Q")
RATE_EACH, DOUBLE = 1, 2

_STEPS = (1, 2, 3)  # kinds that have losses
MAX_GRADIENT = 1e30  # times any learning rate in use it is finite in float32


class Kind(IntEnum):
    """Of a record."""

    SETUP = 0
    STEP = 1  # SPSA
    ANCHOR = 2  # MeZO-SVRG: a full-batch step at a new anchor
    BETWEEN = 3  # MeZO-SVRG: a step between anchors
    REFUSED = 4  # the step counts, the weights were restored
    INTERRUPTED = 5  # the closure raised: the step does not count, the weights were restored
    CHECK = 6  # no step


_KINDS = tuple(Kind)


@dataclass(frozen=True, slots=True)
class RefusedSteps:
    """A count of them, over the records of a run one after the other: after an anchor that was refused, all steps until
    the next change nothing either.
    """

    count: int = 0
    at_anchor: bool = False

    def after(self, record: Record) -> RefusedSteps:
        """The count with one record more."""
        refused = record.refused
        at_anchor = refused if record.kind is Kind.ANCHOR else self.at_anchor
        return RefusedSteps(self.count + (refused or (record.kind is Kind.BETWEEN and at_anchor)), at_anchor)


@dataclass(frozen=True, slots=True)
class Record:
    """One step.

    Attributes:
        step: steps taken before it.
        kind: what it was.
        rates: its learning rate for each parameter group; none if the step was refused or interrupted.
        losses: (L+, L-) of each direction.
        anchor_losses: BETWEEN: the same at the anchor.
        probes: REFUSED, INTERRUPTED: how many times the weights had been perturbed by then.
        eps: scale of the perturbation.
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
        """g of each direction: (L+ - L-) / 2 eps."""
        return projected_gradients(self.losses, self.eps)

    @property
    def refused(self) -> bool:
        """Whether it changed nothing because of its losses. On a GPU, where nobody waits for the losses, such a step is
        of the kind that it was meant to be.
        """
        gradients = (*self.projected_gradients, *projected_gradients(self.anchor_losses, self.eps))
        return self.kind is Kind.REFUSED or not all(abs(g) <= MAX_GRADIENT for g in gradients)

    @property
    def loss(self) -> float | None:
        """Mean of the losses at θ ± eps z, None if the step has none."""
        flat = [value for pair in self.losses for value in pair]
        return sum(flat) / len(flat) if flat else None


def projected_gradients(losses: Sequence[tuple[Any, Any]], eps: float) -> list[float]:
    """g = (L+ - L-) / 2 eps of each pair."""
    return [(plus - minus) / (2 * eps) for plus, minus in losses]


class Damaged(ValueError):
    """Bytes that are no whole record."""


class Unknown(Damaged):
    """A whole record, its checksum right, that means nothing to this version."""


def encode_setup(setup: Setup, crc: int) -> bytes:
    """`crc` is that of the record before.

    Raises:
        TypeError, ValueError: it is none that could be read again.
    """
    text = as_text(setup)
    return _seal(Kind.SETUP, 0, 0, LENGTH.pack(len(text)) + text, crc)


def encode(record: Record, crc: int) -> bytes:
    """`crc` is that of the record before."""
    if record.kind in (Kind.REFUSED, Kind.INTERRUPTED):
        return _seal(record.kind, 0, 0, LENGTH.pack(record.probes), crc)
    each = len(set(record.rates)) > 1
    rates = record.rates if each else record.rates[:1]
    losses = [value for pair in (*record.losses, *record.anchor_losses) for value in pair]
    double = not all(_fits_float32(value) for value in losses)
    body = struct.pack(f"<{len(rates)}d", *rates) + struct.pack(f"<{len(losses)}{'d' if double else 'f'}", *losses)
    flags = RATE_EACH * each | DOUBLE * double
    return _seal(record.kind, flags, len(record.losses) - 1, body, crc)


def encode_check(fingerprint: str, crc: int) -> bytes:
    """`crc` is that of the record before."""
    return _seal(Kind.CHECK, 0, 0, _FINGERPRINT.pack(int(fingerprint, 16)), crc)


def decode_check(data: bytes | bytearray, at: int) -> str:
    """The fingerprint in the record at byte `at`, which `check` has seen."""
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
    """Of the record that starts at byte `at`."""
    return Kind(HEAD.unpack_from(data, at)[1])


def check(data: bytes | bytearray, at: int, crc: int, groups: int | None) -> tuple[Kind, int]:
    """The kind and the end of the record that starts at byte `at`, after one whose crc is `crc`.

    Args:
        groups: parameter groups of the setup before, None if there is none.

    Raises:
        Damaged: there is no whole and sound record.
    """
    if len(data) - at < HEAD.size:
        raise Damaged(f"cut off: {len(data) - at} bytes are no record")
    stored, kind, flags, count = HEAD.unpack_from(data, at)
    if kind == Kind.SETUP and len(data) - at < HEAD.size + LENGTH.size:
        raise Damaged("cut off")
    length = LENGTH.unpack_from(data, at + HEAD.size)[0] if kind == Kind.SETUP else 0
    size = size_of(kind, flags, count, groups or 0, length)
    if size is None:
        raise Damaged(f"no kind of record has the number {kind}")
    end = at + size
    if end > len(data):
        raise Damaged(f"cut off, or damaged: it should end at byte {end} of {len(data)}")
    if zlib.crc32(memoryview(data)[at + 4 : end], crc) != stored:
        raise Damaged("its checksum is wrong")
    if kind != Kind.SETUP and groups is None:
        raise Unknown("expected a setup before it, got none")
    return _KINDS[kind], end


def size_of(kind: int, flags: int, count: int, groups: int, length: int) -> int | None:
    """Bytes of a record, None if there is no such kind; `length` is that of a setup's text."""
    if kind in _STEPS:
        pairs = (count + 1) * (2 if kind == Kind.BETWEEN else 1)
        return HEAD.size + 8 * (groups if flags & RATE_EACH else 1) + pairs * (16 if flags & DOUBLE else 8)
    if kind == Kind.SETUP:
        return HEAD.size + LENGTH.size + length
    if kind in (Kind.REFUSED, Kind.INTERRUPTED):
        return HEAD.size + LENGTH.size
    return HEAD.size + _FINGERPRINT.size if kind == Kind.CHECK else None


def decode_setup(data: bytes | bytearray, at: int, end: int) -> Setup:
    """The setup between bytes `at` and `end`, which `check` has seen.

    Raises:
        Unknown: it is sound, but no setup that this version knows.
    """
    try:
        return from_text(bytes(data[at + HEAD.size + LENGTH.size : end]))
    except (ValueError, TypeError) as error:
        raise Unknown(str(error)) from error


def decode(data: bytes | bytearray, at: int, end: int, step: int, setup: Setup) -> Record:
    """The record between bytes `at` and `end`, which `check` has seen; not a setup."""
    _, number, flags, count = HEAD.unpack_from(data, at)
    kind, start = Kind(number), at + HEAD.size
    if kind in (Kind.REFUSED, Kind.INTERRUPTED):
        return Record(step, kind, probes=int(LENGTH.unpack_from(data, start)[0]), eps=setup.eps)
    groups = len(setup.weight_decays)
    rates = struct.unpack_from(f"<{groups if flags & RATE_EACH else 1}d", data, start)
    start += 8 * len(rates)
    code = "d" if flags & DOUBLE else "f"
    flat: Any = struct.unpack(f"<{(end - start) // struct.calcsize(code)}{code}", data[start:end])
    pairs = tuple(zip(flat[::2], flat[1::2], strict=True))
    each = rates if len(rates) == groups else rates * groups
    return Record(step, kind, each, pairs[: count + 1], pairs[count + 1 :], eps=setup.eps)
