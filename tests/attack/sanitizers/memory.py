"""Memory of exactly the size that a call may touch, from the C library's malloc, around which a sanitizer watches."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]

NONE, THRESHOLD, BOOL, BITS, RECORD = range(5)
BYTES = {0: 4, 1: 2, 2: 2}  # of an element of each dtype


class Memory:
    """So many bytes, which begin after others of the same allocation and end with it."""

    def __init__(self, size: int, before: int = 0):
        self.size, self._all = size, _libc.malloc(max(before + size, 1))
        self.address = self._all + before

    def __del__(self) -> None:
        _libc.free(self._all)

    def fill(self, content: bytes) -> Memory:
        """Write it, which must be so long."""
        assert len(content) == self.size
        ctypes.memmove(self.address, content, self.size)
        return self

    def content(self) -> bytes:
        """What is in it."""
        return ctypes.string_at(self.address, self.size)


@dataclass
class Tensor:
    """An entry of a table, with its memory."""

    numel: int
    offset: int
    dtype: int
    mask: int
    in_place: bool
    number: int  # of the entry
    dst: Memory = field(init=False)
    src: Memory = field(init=False)
    mask_data: Memory | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        chance, size = random.Random(self.number), self.numel * BYTES[self.dtype]
        before = BYTES[self.dtype] * (self.number % 3)  # 16 bytes are not always aligned
        self.src = Memory(size, before).fill(chance.randbytes(size))
        self.dst = self.src if self.in_place else Memory(size, 16 - before).fill(bytes(size))
        if self.mask == BOOL:
            bools = bytes(b & 1 for b in chance.randbytes(self.numel))
            self.mask_data = Memory(self.numel, self.number % 5).fill(bools)
        elif self.mask in (BITS, RECORD):
            count = (self.numel + 7) // 8
            self.mask_data = Memory(count, self.number % 5).fill(chance.randbytes(count))

    @property
    def threshold(self) -> float:
        """By which some of the elements are masked."""
        return 1e-3 * self.number

    def row(self) -> list[object]:
        """As `_native.Table` takes it."""
        mask = (self.mask_data.address, self.mask_data.size) if self.mask_data else (0, 0)
        where = [self.dst.address, self.src.address, self.numel, self.offset, (2654435761 * self.number) % 2**32]
        kind = [self.number % 2, self.dtype, self.mask, self.threshold]
        return [*where, *kind, mask[0], self.dst.size, self.src.size, mask[1]]

    def content(self) -> bytes:
        """Of all its memory."""
        return self.dst.content() + self.src.content() + (self.mask_data.content() if self.mask_data else b"")
