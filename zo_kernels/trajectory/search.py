"""Searches for sound records after a damaged one, and counts the steps that are lost with it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from .record import HEAD, LENGTH, TAKEN, Kind, possible_flags, size_of
from .setups import MAX_DIRECTIONS, MAX_TEXT, Setup, loaded

SETUP_BEGINS = b'{"method":"'
_TEXT = HEAD.size + LENGTH.size  # where the text of a setup begins
_MAX_TRIES = 100_000
_MAX_OPTIONS = 2**14  # bytes of a setup's text before its weights
_LONGEST_NUMBER = 24
_DIRECTIONS = re.compile(rb'"directions":(\d{1,5})\b')
_DECAYS = re.compile(rb'"weight_decays":\[([^\]]*)\]')
_COUNTED = (*TAKEN, Kind.REFUSED)  # kinds that are steps


@dataclass(frozen=True)
class Remainder:
    """The rest of a trajectory, from a damaged record on.

    Attributes:
        sound: whether it has a sound record.
        steps: how many steps it has.
        exact: whether `steps` was counted; otherwise it was estimated from the number of bytes.
    """

    sound: bool
    steps: int
    exact: bool


def search(data: bytes | bytearray, at: int, setup: Setup | None) -> Remainder:
    """Search a trajectory from the damaged record at byte `at` on.

    Time and memory depend on the number of bytes only: a crafted file cannot make the search slow.

    Args:
        setup: the setup that holds at this byte, None if it could not be read.
    """
    records = _Search(data, at, setup)
    sound, steps, exact = False, 0, True
    while at < len(data):
        there = records.next(at)
        n, known = records.steps_between(at, len(data) if there is None else there[0])
        steps, exact = steps + n, exact and known
        if there is None:
            break
        sound = True
        start, end = there
        while True:
            steps += data[start + 4] in _COUNTED
            records.take(start, end)
            at = end
            if (following := records.sound(at, records.crc(start))) is None:
                break
            start, end = at, following
    return Remainder(sound, steps, exact)


def length_of_text(data: bytes | bytearray, start: int) -> int | None:
    """The length of a setup's text that begins at byte `start`, going by its JSON; None if there is no whole one."""
    if data[start : start + len(SETUP_BEGINS)] != SETUP_BEGINS:
        return None
    for size in (2**12, 2**16, 2**20, MAX_TEXT):  # so that the time depends on the text, not on what follows it
        text = bytes(data[start : start + size])
        try:
            return int(loaded(text, whole=False)[1])
        except JSONDecodeError as error:
            if len(text) < size or not ends_within(text, error):
                return None
        except ValueError:
            return None
    return None


def ends_within(text: bytes, error: JSONDecodeError) -> bool:
    """Whether the only fault in a setup's text is that it is cut off."""
    return error.msg.startswith("Unterminated string") or len(text) - error.pos <= _LONGEST_NUMBER


def _possible(directions: int) -> int | None:
    return directions if 1 <= directions <= MAX_DIRECTIONS else None


class _Search:
    """Finds a record whose checksum the next record continues; by chance that happens once in 2^32 times."""

    def __init__(self, data: bytes | bytearray, at: int, setup: Setup | None):
        self._data, self._view = data, memoryview(data)
        self._work = 4 * (len(data) - at) + 2**24  # bytes that may still be read
        self._tries = _MAX_TRIES
        self._text = -1  # where the next setup may begin
        self._directions = None if setup is None else setup.directions
        self._groups = 1 if setup is None else len(setup.weight_decays)
        self._guess(at)

    def _guess(self, at: int) -> None:
        """Take directions and groups from the text of a setup at byte `at`, even if it is not sound."""
        start = at + _TEXT
        if self._data[start : start + len(SETUP_BEGINS)] == SETUP_BEGINS:
            text = self._view[start : start + _MAX_OPTIONS]
            self._work -= len(text)
            if found := _DIRECTIONS.search(text):
                self._directions = _possible(int(found[1]))
            if found := _DECAYS.search(text):
                self._groups = found[1].count(b",") + 1

    def take(self, start: int, end: int) -> None:
        """Take directions and groups from the sound record between two bytes, if it is a setup."""
        if self._data[start + 4] != Kind.SETUP:
            return
        try:
            given: Any = loaded(bytes(self._data[start + _TEXT : end]))
            self._directions, self._groups = _possible(int(given["directions"])), len(given["weight_decays"])
        except (ValueError, TypeError, KeyError, OverflowError):
            self._guess(start)

    def crc(self, at: int) -> int:
        """The checksum stored in the record at a byte."""
        return int(LENGTH.unpack_from(self._data, at)[0])

    def _end(self, at: int) -> int | None:
        """Where the record at a byte ends according to its head; None if that cannot be a head."""
        data = self._data
        if len(data) - at < _TEXT:
            return None
        _, kind, flags, count = HEAD.unpack_from(data, at)
        stepped = kind in TAKEN
        if flags & ~possible_flags(kind) or (count and not stepped):
            return None
        if stepped and self._directions is not None and count != self._directions - 1:
            return None
        length = LENGTH.unpack_from(data, at + HEAD.size)[0]
        if kind == Kind.SETUP and length > MAX_TEXT:
            return None
        size = size_of(kind, flags, count, self._groups, length)
        return None if size is None or at + size > len(data) else at + size

    def sound(self, at: int, crc: int) -> int | None:
        """Where the record at a byte ends, if it is sound after a record with checksum `crc`; otherwise None."""
        if (end := self._end(at)) is None or self._work < 0:
            return None
        self._work -= end - at
        return end if zlib.crc32(self._view[at + 4 : end], crc) == self.crc(at) else None

    def _ends(self, at: int) -> set[int]:
        """All bytes where a record with a damaged head may end."""
        if len(self._data) - at < _TEXT:
            return set()
        count = (self._directions or HEAD.unpack_from(self._data, at)[3] + 1) - 1
        sizes = {size_of(kind, flags, count, self._groups, 0) or 0 for kind in range(1, 8) for flags in range(8)}
        sizes.add(_TEXT + LENGTH.unpack_from(self._data, at + HEAD.size)[0])
        if (length := self._length(at)) is not None:
            sizes.add(_TEXT + length)
        return {at + size for size in sizes if at + size < len(self._data)}

    def _length(self, at: int) -> int | None:
        """The length of the text of the record at a byte, if it is a setup whose text is whole."""
        begins = self._data[at + _TEXT : at + _TEXT + len(SETUP_BEGINS)] == SETUP_BEGINS
        if not begins or self._work < 0:
            return None
        length = length_of_text(self._data, at + _TEXT)
        self._work -= min(len(self._data) - at, MAX_TEXT) if length is None else length
        return length

    def next(self, at: int) -> tuple[int, int] | None:
        """Find the first sound record after byte `at`: where it begins and ends."""
        if len(self._data) - at < 2 * _TEXT:
            return None
        for start in sorted(self._ends(at)):
            if (end := self.sound(start, self.crc(at))) is not None:
                return start, end
        known = self._directions
        for directions in (known, None) if known is not None else (None,):
            self._directions = directions
            if (there := self._scan(at)) is not None:
                return there
            self._directions = known
        return None

    def _scan(self, at: int) -> tuple[int, int] | None:
        """Try every byte after `at` where a head, or the text of a setup, may begin."""
        n = self._directions
        count = rb".." if n is None else re.escape((n - 1).to_bytes(4, "little")[:2])
        heads = re.compile(rb"(?:[\1-\3][\0-\3]|\007[\0-\7])" + count + rb"|[\4-\6]\0\0\0", re.DOTALL)
        start, head = at + 1, -1
        while self._tries > 0 and self._work > 0:
            self._tries -= 1
            if head < start:
                match = heads.search(self._data, start + 4)
                head = len(self._data) if match is None else match.start() - 4
                self._work -= head - start
            if self._text < start:
                text = self._data.find(SETUP_BEGINS, start + _TEXT)
                self._text = len(self._data) if text < 0 else text - _TEXT
            start = min(head, self._text)
            if start >= len(self._data):
                return None
            kept = self._directions, self._groups
            self._guess(start)
            end = self._end(start)
            if end is not None and end < len(self._data) and self.sound(end, self.crc(start)) is not None:
                return start, end
            self._directions, self._groups = kept
            start += 1
        return None

    def steps_between(self, at: int, end: int) -> tuple[int, bool]:
        """How many steps the unsound bytes held, and whether that is known or estimated."""
        if self._end(at) == end:
            return int(self._data[at + 4] in _COUNTED), True
        if end == len(self._data) and end - at < _TEXT:
            return 0, True  # less than the beginning of a record
        if self._data[at + _TEXT : at + _TEXT + 2] == SETUP_BEGINS[:2]:
            length = self._length(at) or LENGTH.unpack_from(self._data, at + HEAD.size)[0]
            at = min(at + _TEXT + length, end)
        step = size_of(Kind.STEP, 0, (self._directions or 1) - 1, 1, 0) or 1
        return round((end - at) / step), False
