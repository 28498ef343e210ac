"""What may become of a file: bits, bytes, blocks and records that are lost, changed, moved or repeated."""

from __future__ import annotations

import random
from collections.abc import Callable

Change = Callable[[random.Random, bytes, list[int], bytes], bytes]


def flip(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def change(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        out[draw.randrange(len(out))] = draw.choice((0, 1, 255, draw.randrange(256)))
    return bytes(out)


def head(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    """A byte of what a record says of itself: checksum, kind, flags, count, length."""
    out, at = bytearray(data), draw.choice([8, *ends])
    if (place := at + draw.randrange(12)) < len(out):
        out[place] ^= draw.randrange(1, 256)
    return bytes(out)


def cut(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def insert(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    at = draw.choice((draw.randrange(len(data) + 1), draw.choice([0, 8, *ends])))
    return data[:at] + draw.randbytes(draw.choice((1, 2, 7, 24, 100))) + data[at:]


def delete(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    at = draw.choice((draw.randrange(len(data)), draw.choice([0, 8, *ends])))
    return data[:at] + data[at + draw.choice((1, 2, 7, 24, 100)) :]


def zero(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    at, n = draw.randrange(len(data)), draw.choice((1, 4, 16, 64))
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def zero_tail(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    """The length reached the disk, the contents did not."""
    at = draw.choice((draw.randrange(len(data)), draw.choice([8, *ends])))
    return data[:at] + bytes(len(data) - at)


def zero_block(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    n = draw.choice((512, 4096))
    at = draw.randrange(0, len(data), n)
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def swap_blocks(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    n = draw.choice((512, 4096))
    blocks = [data[i : i + n] for i in range(0, len(data), n)]
    i, j = draw.randrange(len(blocks)), draw.randrange(len(blocks))
    blocks[i], blocks[j] = blocks[j], blocks[i]
    return b"".join(blocks)


def _records(data: bytes, ends: list[int]) -> list[bytes]:
    starts = [0, 8, *ends]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def swap_records(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    records = _records(data, ends)
    i, j = draw.randrange(len(records)), draw.randrange(len(records))
    records[i], records[j] = records[j], records[i]
    return b"".join(records)


def repeat_record(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    records = _records(data, ends)
    i = draw.randrange(len(records))
    return b"".join([*records[: i + 1], *records[i:]])


def drop_record(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    records = _records(data, ends)
    del records[draw.randrange(len(records))]
    return b"".join(records)


def tail_of_another(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> bytes:
    at = draw.choice((len(data), draw.randrange(len(data)), draw.choice([8, *ends])))
    return data[:at] + other[draw.choice((0, 8, min(at, len(other)), draw.randrange(len(other)))) :]


CHANGES: dict[str, Change] = {
    f.__name__.replace("_", " "): f
    for f in (
        flip, change, head, cut, insert, delete, zero, zero_tail, zero_block, swap_blocks, swap_records, repeat_record,
        drop_record, tail_of_another,
    )
}  # fmt: skip


def damaged(draw: random.Random, data: bytes, ends: list[int], other: bytes) -> tuple[str, bytes]:
    """One change or two, what they were and what came of it."""
    names = draw.choices(list(CHANGES), k=draw.choice((1, 1, 1, 2)))
    for name in names:
        inside = [end for end in ends if end <= len(data)]
        data = CHANGES[name](draw, data, inside, other) if data else data
    return " and ".join(names), data
