"""Calls of the CUDA extension's host build: its threads run one after the other, over tables as a GPU's."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, cycle, islice, product
from typing import Any

from memory import BITS, BOOL, BYTES, RECORD, Memory, Tensor

BLOCK = 2048
FURTHER = [(3 * BLOCK + 16, BLOCK - 8), (2 * BLOCK, 2**34 - BLOCK), (BLOCK, 2**62), (5 * BLOCK, 0)]


def _aligned(t: Tensor) -> bool:
    pointers = t.dst.address | t.src.address
    if t.mask == BOOL and t.mask_data:
        pointers |= 2 * t.mask_data.address
    return t.numel % 8 == 0 and t.offset % 8 == 0 and pointers % 16 == 0


def _put(layout: str, *values: Any) -> Memory:
    packed = struct.pack(layout, *values)
    return Memory(len(packed)).fill(packed)


class Launch:
    """A pass over tensors of one dtype and mask, as arguments of `_cuda.axpy`."""

    def __init__(
        self, tensors: list[Tensor], distribution: int, mask: int, stochastic: bool, blocks: int, directions: int
    ):
        rows = b""
        for t in tensors:
            mask_address = t.mask_data.address if t.mask_data else 0
            rows += struct.pack("<QQQqqIifIQ", t.dst.address, t.src.address, mask_address, t.numel, t.offset, t.number,
                                t.number % 2, t.threshold, _aligned(t), 0)  # fmt: skip
        size = BLOCK * blocks
        chunks = [(t.offset + t.numel - 1) // size - t.offset // size + 1 for t in tensors]
        n = len(tensors)
        self.rows = Memory(len(rows), -len(rows) % 8).fill(rows)
        self.ids = _put(f"<{n}i", *range(n))
        self.ends = _put(f"<{n + 1}i", 0, *accumulate(chunks))
        self.seeds = _put(f"<{directions}Q", *islice(cycle([0, 2**64 - 1, 77]), directions))
        scales = islice(cycle([1e-3, -0.25, 3e-6, 0.5, 1e-4, 1.0]), 2 * directions)
        self.scales = _put(f"<{2 * directions}f", *scales)
        self.decays = _put("<2f", 0.9, 1.0)
        self.arguments: dict[str, Any] = {
            "distribution": distribution, "dtype": tensors[0].dtype, "mask": mask, "stochastic": stochastic,
            "decay": directions > 1, "rows": self.rows.address, "ids": self.ids.address,
            "first_chunk": self.ends.address, "active": n,
            "programs": sum(chunks), "blocks_per_chunk": blocks, "seeds": self.seeds.address,
            "scales": self.scales.address, "decays": self.decays.address, "directions": directions, "stream": 0,
        }  # fmt: skip


def cuda_matrix(cuda: Any, shards: list[tuple[int, int]], digest: Callable[[list[Tensor]], str]) -> Iterator[str]:
    """All dtypes, masks, roundings, in place and not, by passes of one direction and several, of normals and signs."""
    for dtype, mask, in_place in product(range(3), range(5), (True, False)):
        few = [s for s in shards if 0 < s[0] < 2**15] + FURTHER
        tensors = [Tensor(n, at, dtype, mask, in_place, 3 * i) for i, (n, at) in enumerate(few)]
        for distribution, (stochastic, blocks, several) in product(range(2), ((False, 1, False), (True, 4, True))):
            directions = (3, 9)[distribution] if several else 1  # words of eight directions of signs are made together
            groups: dict[tuple[int, bool], list[Tensor]] = {}
            for t in tensors:
                kind = mask
                if mask == RECORD and not _aligned(t):
                    assert t.mask_data is not None
                    cuda.record(dtype, t.src.address, t.mask_data.address, t.threshold, t.numel, 0)
                    kind = BITS
                groups.setdefault((kind, _aligned(t)), []).append(t)
            for (kind, _), members in groups.items():
                launch = Launch(members, distribution, kind, stochastic, blocks, directions)
                cuda.axpy(**launch.arguments)
        yield f"cuda dtype {dtype} mask {mask} in place {in_place}: {digest(tensors)}"


def cuda_refusals(cuda: Any) -> int:
    """Numbers that the extension itself refuses; how many."""
    launch = Launch([Tensor(16, 0, 0, 0, True, 1)], 0, 0, False, 1, 1)
    bad: dict[str, list[Any]] = {
        "distribution": [-1, 2], "dtype": [-1, 3], "mask": [-1, 5], "rows": [0, 4], "ids": [0, 2],
        "first_chunk": [0, 1],
        "active": [0, -1, 2**31], "programs": [0, -1, 2**31], "blocks_per_chunk": [0, -1, 3, 2**20],
        "seeds": [0, 4], "scales": [0, 2], "decays": [0, 2], "directions": [0, -1, 2**31], "stream": [-1],
    }  # fmt: skip
    count = 0
    for name, values in bad.items():
        for value in values:
            try:
                cuda.axpy(**{**launch.arguments, name: value})
            except (ValueError, TypeError):
                count += 1
            else:
                sys.exit(f"cuda went through: {name} = {value}")
    w = Memory(16 * BYTES[0])
    right: dict[str, Any] = {"dtype": 0, "src": w.address, "mask": w.address, "threshold": 1.0, "numel": 1}
    right["stream"] = 0
    for name, value in [
        ("dtype", 3),
        ("src", 0),
        ("src", 2),
        ("mask", 0),
        ("numel", 0),
        ("numel", -1),
        ("numel", 2**42),
    ]:
        try:
            cuda.record(**{**right, name: value})
        except (ValueError, TypeError):
            count += 1
        else:
            sys.exit(f"cuda's record went through: {name} = {value}")
    return count
