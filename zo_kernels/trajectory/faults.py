"""Diagnoses a trajectory that cannot be read to its end, so that `recover` gives up no more than is lost."""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass, replace
from json import JSONDecodeError
from typing import Any, Literal

from .order import Order
from .record import HEAD, LENGTH, MAGIC, RATE_EACH, Damaged, Kind, Unknown, size_of
from .search import SETUP_BEGINS, Remainder, ends_within, length_of_text, search
from .setups import MAX_TEXT, loaded

_MIN_TEXT = 200  # bytes of a setup's text; a shorter one lacks fields
_PRINTABLE = re.compile(rb"[ -~]*")
_MAX_UNKNOWN = 1 << 16  # bytes of a record of an unknown kind: how far its end is searched for
_MAX_REASON = 300  # characters


@dataclass(frozen=True)
class Fault:
    """Where the sound beginning of a trajectory ends, and why.

    Attributes:
        byte: where the first record begins that is not sound.
        record: how many records come before it, setups and checks included.
        reason: what is wrong.
        kind: "incomplete": the file ends within the record, as a killed process or a full disk leaves it. "damaged":
            the record is broken. "unknown": its checksum is right, but this version cannot interpret it; a newer one
            may. "foreign": the file is no trajectory, or one of another version.
        steps: how many steps are lost with this record and all after it.
        exact: whether `steps` was counted; otherwise it was estimated.
    """

    byte: int
    record: int
    reason: str
    kind: Literal["incomplete", "damaged", "unknown", "foreign"]
    steps: int = 0
    exact: bool = True

    @property
    def recoverable(self) -> bool:
        """Whether the records before the fault are a trajectory of this version."""
        return self.kind != "foreign" and not (self.kind == "unknown" and self.byte <= len(MAGIC))


class FaultyTrajectory(ValueError):
    """A trajectory cannot be read to its end.

    Attributes:
        fault: what is wrong, and where.
    """

    fault: Fault

    @classmethod
    def of(cls, fault: Fault, path: object, steps: int) -> FaultyTrajectory:
        """The error for the file at `path`, which has `steps` sound steps."""
        error = cls(f"{path}: {_message(fault, steps)}")
        error.fault = fault
        return error


def _message(fault: Fault, steps: int) -> str:
    if fault.kind == "foreign":
        return fault.reason
    where = f"record {fault.record}, at byte {fault.byte}: {fault.reason}; {steps} steps come before it"
    if fault.kind == "incomplete":
        return (
            f"{where}; a killed process or a full disk leaves such an end: `resume` cuts it off, and "
            "Trajectory.load(..., recover='incomplete') ignores it"
        )
    if fault.steps:
        where = f"{where}, {'' if fault.exact else 'about '}{fault.steps} are lost with it and after it"
    if fault.kind == "unknown":
        where = f"{where}; a newer version of zo_kernels may read it"
    if not fault.recoverable:
        return where
    return (
        f"{where}; with recover=True, Trajectory.load keeps only the steps before it, and `resume` continues after "
        "them and moves the rest to a file beside it"
    )


def diagnose_beginning(data: bytes | bytearray) -> Fault | None:
    """What is wrong with the first bytes of a trajectory; None if nothing is."""
    first = bytes(data[: len(MAGIC)])
    if first == MAGIC:
        return None
    if MAGIC.startswith(first):
        reason = f"cut off: {len(first)} of the {len(MAGIC)} bytes that a trajectory begins with"
        return Fault(0, 0, reason, "incomplete")
    at = len(MAGIC)
    if any(_sealed(data, at, zlib.crc32(MAGIC), head, 1) for head in Order().heads()):
        lost = search(data, at, None)
        reason = f"expected {MAGIC!r}, got {first!r}, before a record that is sound"
        return Fault(0, 0, reason, "damaged", lost.steps, lost.exact)
    reason = f"expected a trajectory, which begins with {MAGIC!r}, got {first!r}"
    if re.fullmatch(rb"ZOTRAJ\d+\n?", first):
        reason = f"{reason}: another version of zo_kernels wrote it"
    return Fault(0, 0, reason, "foreign")


def diagnose(data: bytes | bytearray, at: int, crc: int, order: Order, record: int, error: Damaged) -> Fault:
    """Diagnose the record at byte `at`, which could not be read because of `error`.

    Args:
        crc: that of the record before.
        order: the grammar after the records before.
        record: how many records come before.
    """
    lost = search(data, at, order.setup)
    if isinstance(error, Unknown):
        return _fault(at, record, f"its checksum is right, but {error}", "unknown", lost)
    heads = order.heads()
    groups = 1 if order.setup is None else len(order.setup.weight_decays)
    if any(_sealed(data, at, crc, head, groups) for head in heads):
        return _fault(at, record, "it is damaged in its first bytes", "damaged", replace(lost, exact=False))
    if not lost.sound and _may_be_cut(bytes(data[at:]), order, heads, groups):
        return Fault(at, record, f"cut off after {len(data) - at} bytes", "incomplete")
    if data[at + 4 : at + HEAD.size] not in heads and _sealed_somewhere(data, at, crc):
        kind, flags, count = struct.unpack_from("<BBH", data, at + 4)
        reason = f"its checksum is right, but kind {kind} with flags {flags} and count {count} is not known"
        return _fault(at, record, reason, "unknown", lost)
    if len(data) - at >= LENGTH.size and data.count(0, at) == len(data) - at:
        return _fault(at, record, f"it is {len(data) - at} zeros, as a power cut leaves them", "damaged", lost)
    return _fault(at, record, str(error), "damaged", lost)


def _fault(at: int, record: int, reason: str, kind: Any, lost: Remainder) -> Fault:
    return Fault(at, record, reason[:_MAX_REASON], kind, lost.steps, lost.exact)


def _sealed(data: bytes | bytearray, at: int, crc: int, head: bytes, groups: int) -> bool:
    """Whether the record at byte `at` has the right checksum if its head is replaced by `head`.

    The length of a setup is then taken from its text.
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
    """Whether the record at byte `at`, of whatever kind, has the right checksum for some length."""
    if len(data) - at < HEAD.size:
        return False
    stored, view = LENGTH.unpack_from(data, at)[0], memoryview(data)
    crc = zlib.crc32(view[at + 4 : at + HEAD.size], crc)
    for i in range(at + HEAD.size, min(len(data), at + _MAX_UNKNOWN)):
        crc = zlib.crc32(view[i : i + 1], crc)
        if crc == stored:
            return True
    return False


def _may_be_cut(rest: bytes, order: Order, heads: list[bytes], groups: int) -> bool:
    """Whether these bytes are an incomplete record that may come next."""
    if len(rest) >= LENGTH.size and not any(rest[: HEAD.size + LENGTH.size]):
        return False  # zeros; a crc of 0 is as rare as one in 2^32
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
        return int.from_bytes(body, "little") <= order.setup.most_probes
    if kind == Kind.CHECK:
        return True
    rates = min(groups if flags & RATE_EACH else 1, len(body) // 8)
    return all(0 <= rate < math.inf for rate in struct.unpack_from(f"<{rates}d", body))


def _may_be_cut_setup(body: bytes) -> bool:
    if len(body) < LENGTH.size:
        return int.from_bytes(body, "little") <= MAX_TEXT
    length, text = LENGTH.unpack_from(body)[0], body[LENGTH.size :]
    if not _MIN_TEXT <= length <= MAX_TEXT or len(text) >= length:
        return False
    if text[: len(SETUP_BEGINS)] != SETUP_BEGINS[: len(text)] or not _PRINTABLE.fullmatch(text):
        return False
    try:
        loaded(text, whole=False)
    except JSONDecodeError as error:
        return ends_within(text, error)
    except ValueError:
        return False
    return False  # the text ends before its length says so
