"""What is wrong with a trajectory where it cannot be read on: told apart, so that no more is given up than is lost."""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass, replace
from json import JSONDecodeError
from typing import Any, Literal

from .further import SETUP_BEGINS, Further, ends_within, further, length_of_text
from .order import Order
from .record import HEAD, LENGTH, MAGIC, RATE_EACH, Damaged, Kind, Unknown, size_of
from .setups import MAX_TEXT, loaded

_LEAST_TEXT = 200  # bytes of a setup; a shorter one lacks fields
_PRINTABLE = re.compile(rb"[ -~]*")
_UNSEEN = 1 << 16  # bytes of a record of a kind that this version does not know, within which its end is looked for
_TOLD = 300  # characters of a reason


@dataclass(frozen=True)
class Fault:
    """Where the sound beginning of a trajectory ends, and why.

    Attributes:
        byte: at which the record begins that is not sound.
        record: how many records are before it, setups and checks included.
        reason: what is wrong.
        kind: "incomplete": the beginning of a record, and the end of the file: what a killed process or a full disk
            leaves. "damaged". "unknown": its checksum is right, but it means nothing to this version; a newer one wrote
            it. "foreign": this is no trajectory, or one of another version.
        steps: how many steps are lost with it and all that comes after it.
        exact: whether they could be counted, or only guessed.
    """

    byte: int
    record: int
    reason: str
    kind: Literal["incomplete", "damaged", "unknown", "foreign"]
    steps: int = 0
    exact: bool = True

    @property
    def recoverable(self) -> bool:
        """Whether what comes before it is a trajectory of this version."""
        return self.kind != "foreign" and not (self.kind == "unknown" and self.byte <= len(MAGIC))


class FaultyTrajectory(ValueError):
    """Not all of it can be read.

    Attributes:
        fault: why.
    """

    fault: Fault

    @classmethod
    def of(cls, fault: Fault, path: object, steps: int) -> FaultyTrajectory:
        """About the file at `path`, of which so many steps are sound."""
        error = cls(f"{path}: {_told(fault, steps)}")
        error.fault = fault
        return error


def _told(fault: Fault, steps: int) -> str:
    if fault.kind == "foreign":
        return fault.reason
    where = f"record {fault.record}, at byte {fault.byte}: {fault.reason}; {steps} steps come before it"
    if fault.kind == "incomplete":
        return (
            f"{where}; a killed process or a full disk leaves that: `resume` cuts it off, and "
            "Trajectory.load(..., recover='incomplete') leaves it out"
        )
    if fault.steps:
        where = f"{where}, {'' if fault.exact else 'about '}{fault.steps} with it and after it"
    if fault.kind == "unknown":
        where = f"{where}; a newer version of zo_kernels may know it"
    if not fault.recoverable:
        return where
    return (
        f"{where}; with recover=True, Trajectory.load takes those before it alone, and `resume` goes on after them and "
        "moves the rest to a file beside it"
    )


def beginning(data: bytes | bytearray) -> Fault | None:
    """What is wrong with the first bytes of a trajectory."""
    first = bytes(data[: len(MAGIC)])
    if first == MAGIC:
        return None
    if MAGIC.startswith(first):
        reason = f"cut off: {len(first)} of the {len(MAGIC)} bytes that a trajectory begins with"
        return Fault(0, 0, reason, "incomplete")
    at = len(MAGIC)
    if any(_sealed(data, at, zlib.crc32(MAGIC), head, 1) for head in Order().heads()):
        lost = further(data, at, None)
        reason = f"expected {MAGIC!r}, got {first!r}, before a record that is sound"
        return Fault(0, 0, reason, "damaged", lost.steps, lost.exact)
    wanted = f"expected a trajectory, which begins with {MAGIC!r}, got {first!r}"
    newer = re.fullmatch(rb"ZOTRAJ\d+\n?", first)
    return Fault(0, 0, f"{wanted}: it is of another version of zo_kernels" if newer else wanted, "foreign")


def found(data: bytes | bytearray, at: int, crc: int, order: Order, record: int, error: Damaged) -> Fault:
    """The fault of the record at byte `at`, which is none because of `error`, after one whose crc is `crc`."""
    lost = further(data, at, order.setup)
    if isinstance(error, Unknown):
        return _fault(at, record, f"its checksum is right, but {error}", "unknown", lost)
    heads = order.heads()
    groups = 1 if order.setup is None else len(order.setup.weight_decays)
    if any(_sealed(data, at, crc, head, groups) for head in heads):
        return _fault(at, record, "it is damaged in its first bytes", "damaged", replace(lost, exact=False))
    if not lost.sound and _may_be_cut(bytes(data[at:]), order, heads, groups):
        return Fault(at, record, f"cut off: {len(data) - at} bytes of it are there", "incomplete")
    if data[at + 4 : at + HEAD.size] not in heads and _sealed_somewhere(data, at, crc):
        kind, flags, count = struct.unpack_from("<BBH", data, at + 4)
        reason = f"its checksum is right, but kind {kind} with flags {flags} and count {count} is not known"
        return _fault(at, record, reason, "unknown", lost)
    if len(data) - at >= LENGTH.size and data.count(0, at) == len(data) - at:
        return _fault(at, record, f"it is {len(data) - at} zeros, as a power cut leaves them", "damaged", lost)
    return _fault(at, record, str(error), "damaged", lost)


def _fault(at: int, record: int, reason: str, kind: Any, lost: Further) -> Fault:
    return Fault(at, record, reason[:_TOLD], kind, lost.steps, lost.exact)


def _sealed(data: bytes | bytearray, at: int, crc: int, head: bytes, groups: int) -> bool:
    """Whether the record at byte `at` would be sound with this head, and if it is a setup's with the length of what
    follows.
    """
    start = at + HEAD.size
    if len(data) - start < LENGTH.size:
        return False
    if head[0] == Kind.SETUP:
        if (length := length_of_text(data, start + LENGTH.size)) is None:
            return False
        head += LENGTH.pack(length)
        start, end = start + LENGTH.size, start + LENGTH.size + length
    else:
        kind, flags, count = struct.unpack("<BBH", head)
        end = at + (size_of(kind, flags, count, groups, 0) or 0)
    if end > len(data):
        return False
    return zlib.crc32(memoryview(data)[start:end], zlib.crc32(head, crc)) == LENGTH.unpack_from(data, at)[0]


def _sealed_somewhere(data: bytes | bytearray, at: int, crc: int) -> bool:
    """Whether there is an end with which the record at byte `at` would be sound, whatever it is."""
    if len(data) - at < HEAD.size:
        return False
    stored, view = LENGTH.unpack_from(data, at)[0], memoryview(data)
    crc = zlib.crc32(view[at + 4 : at + HEAD.size], crc)
    for i in range(at + HEAD.size, min(len(data), at + _UNSEEN)):
        crc = zlib.crc32(view[i : i + 1], crc)
        if crc == stored:
            return True
    return False


def _may_be_cut(rest: bytes, order: Order, heads: list[bytes], groups: int) -> bool:
    """Whether these bytes are the beginning of a record that may come next, and not all of it."""
    if len(rest) >= LENGTH.size and not any(rest[: HEAD.size + LENGTH.size]):
        return False  # a crc of 0 there is once in 2^32 times
    if not any(head.startswith(rest[4 : HEAD.size]) for head in heads):
        return False
    if len(rest) <= HEAD.size:
        return True
    kind, flags, count = struct.unpack_from("<BBH", rest, 4)
    body = rest[HEAD.size :]
    if kind == Kind.SETUP:
        return _may_be_cut_setup(body)
    if len(rest) >= (size_of(kind, flags, count, groups, 0) or 0):
        return False
    if kind in (Kind.REFUSED, Kind.INTERRUPTED):
        assert order.setup is not None
        return int.from_bytes(body, "little") <= 2 * order.setup.directions
    if kind == Kind.CHECK:
        return True
    rates = min(groups if flags & RATE_EACH else 1, len(body) // 8)
    return all(0 <= rate < math.inf for rate in struct.unpack_from(f"<{rates}d", body))


def _may_be_cut_setup(body: bytes) -> bool:
    if len(body) < LENGTH.size:
        return int.from_bytes(body, "little") <= MAX_TEXT
    length, text = LENGTH.unpack_from(body)[0], body[LENGTH.size :]
    if not _LEAST_TEXT <= length <= MAX_TEXT or len(text) >= length:
        return False
    if text[: len(SETUP_BEGINS)] != SETUP_BEGINS[: len(text)] or not _PRINTABLE.fullmatch(text):
        return False
    try:
        loaded(text, whole=False)
    except JSONDecodeError as error:
        return ends_within(text, error)
    except ValueError:
        return False
    return False  # a whole one, before its length says so
