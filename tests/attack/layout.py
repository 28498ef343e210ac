"""The format of a trajectory once more, so that no attack asks the code that it attacks."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

MAGIC = b"ZOTRAJ1\n"
SETUP, STEP, ANCHOR, BETWEEN, REFUSED, INTERRUPTED, CHECK, ONE_SIDED = range(8)
RATE_EACH, DOUBLE, COMMON = 1, 2, 4


@dataclass(frozen=True)
class Part:
    """A record without its checksum."""

    kind: int
    flags: int
    count: int
    body: bytes

    @property
    def size(self) -> int:
        return 8 + len(self.body)

    @property
    def text(self) -> bytes:
        """Of a setup."""
        return self.body[4:]

    def with_text(self, text: bytes) -> Part:
        return replace(self, body=struct.pack("<I", len(text)) + text)


def parts_of(data: bytes, groups: int) -> list[Part]:
    """The records of a sound file whose setups all have so many parameter groups."""
    result, at = [], len(MAGIC)
    while at < len(data):
        _, kind, flags, count = struct.unpack_from("<IBBH", data, at)
        if kind == SETUP:
            size = 4 + struct.unpack_from("<I", data, at + 8)[0]
        elif kind in (REFUSED, INTERRUPTED):
            size = 4
        elif kind == CHECK:
            size = 8
        else:
            rates = groups if flags & RATE_EACH else 1
            losses = (count + 1) * (4 if kind == BETWEEN else 2)
            if kind == ONE_SIDED and flags & COMMON:
                losses = count + 2
            size = 8 * rates + losses * (8 if flags & DOUBLE else 4)
        result.append(Part(kind, flags, count, data[at + 8 : at + 8 + size]))
        at += 8 + size
    assert at == len(data), "it is sound"
    return result


def sealed(parts: list[Part]) -> bytes:
    """A file of them, with the right checksums."""
    out, crc = [MAGIC], zlib.crc32(MAGIC)
    for part in parts:
        rest = struct.pack("<BBH", part.kind & 255, part.flags & 255, part.count & 65535) + part.body
        crc = zlib.crc32(rest, crc)
        out.append(struct.pack("<I", crc) + rest)
    return b"".join(out)
