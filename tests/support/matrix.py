"""The test matrix: which backends, types, sizes and masks there are, and one table of tensors that has them all."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from zo_kernels import backends, spec
from zo_kernels.backends import reference
from zo_kernels.backends.gpu_table import BLOCK, GpuTable, Group, Work
from zo_kernels.backends.types import Backend, Entry, MaskKind, Pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Native kernels are tested on a machine with a GPU too: the same bits are expected of both.
BACKENDS = [(name, torch.device("cpu")) for name in backends.available(torch.device("cpu")) if name != "reference"]
if DEVICE.type == "cuda":
    BACKENDS += [(name, DEVICE) for name in backends.available(DEVICE) if name != "reference"]

if ("triton", torch.device("cpu")) in BACKENDS:
    import quick_interpreter

    quick_interpreter.hurry()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = ["nearest", "stochastic"]
DISTRIBUTIONS = list(spec.DISTRIBUTIONS)


class Shard(NamedTuple):
    """A tensor of the table."""

    n: int  # elements
    offset: int  # index of the first one in the whole parameter
    # Elements of the storage before the tensor: with one, no access may be wide. In place, the larger of dst and src.
    dst: int = 0
    src: int = 0
    mask: int = 0


# Where a counter's high half changes; signs have counters of their own for the bits that round.
HIGH = {"normal": [2**34], "rademacher": [2**35, 2**39]}
# Kernels for CPUs work on 16 or 32 elements, or another power of two, at a time. A counter has 4 normals or 128 signs.
SMALL = [
    (0, 0),
    (1, 0),
    (2, 1),
    (3, 3),
    (4, 0),
    (5, 2),
    (15, 0),
    (16, 4),
    (17, 1),
    (31, 0),
    (33, 2**40 + 1),
    (63, 0),
    (64, 3),
    (65, 2**34 - 37),
    (127, 2**34 - 64),
    (127, 2**35 - 60),
    (259, 2**39 - 130),
    (500, 0),
    (1000, 2**62 + 5),
    (1025, 2),
]
# Blocks of a GPU's program, whole and ragged, of tensors that wide accesses cover and of others:
# `test_every_kind_of_block_is_in_the_matrix` holds what must be there.
LARGE = [
    # Aligned.
    (64, 2**34 - 32),
    (2 * BLOCK, 0),
    (3 * BLOCK + 16, BLOCK - 8),
    (2 * BLOCK, 2**34 - BLOCK),
    (2 * BLOCK, 2**35 - BLOCK),
    (2 * BLOCK, 2**39 - BLOCK),
    (BLOCK, 2**62),
    (BLOCK + 8, 16, 8, 8, 8),
    # Not by their length or index.
    (2 * BLOCK + 3, 3),
    (2 * BLOCK + 8, 2**34 - BLOCK - 3),
    (2 * BLOCK + 8, 2**35 - BLOCK - 3),
    (2 * BLOCK + 8, 2**39 - BLOCK - 3),
    # Not by their memory.
    (2 * BLOCK, BLOCK, 1, 1),
    (BLOCK + 16, BLOCK - 8, 1, 0),
    (BLOCK + 16, BLOCK - 8, 0, 1),
    (BLOCK + 16, BLOCK - 8, 0, 0, 4),
]
SHARDS = SMALL + LARGE
# Triton's interpreter needs a fiftieth of a second for a block of any size, so there blocks are small, and few: each
# list has a tensor that is aligned and one that is not, of a whole block and a ragged one.
INTERPRETED_BLOCK = 256
INTERPRETED_SHARDS = [
    [(0, 0), (INTERPRETED_BLOCK + 16, 2**34 - 16), (INTERPRETED_BLOCK + 8, 2**34 - INTERPRETED_BLOCK, 1, 1)],
    [(INTERPRETED_BLOCK + 16, 2**34 - INTERPRETED_BLOCK), (INTERPRETED_BLOCK + 3, 2**34 - 3)],
]


def interpreted_shards(plain: bool, distribution: str) -> list[tuple[int, ...]]:
    """The shards of a pass, plain or not, about where one kind of the distribution's counters changes its high half."""
    high = HIGH[distribution][-plain:][0]
    return [(n, offset and offset - 2**34 + high, *placed) for n, offset, *placed in INTERPRETED_SHARDS[plain]]


SEEDS = [0, 2**64 - 1, 0x0123456789ABCDEF]
SCALES = [1e-3, -0.25, 3e-6]


def weights(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Magnitudes from subnormal to large, with zeros, an infinity and a NaN where there is room for them."""
    g = torch.Generator().manual_seed(seed)
    exponent = torch.empty(n).uniform_(-9, 2, generator=g)
    w = torch.randn(n, generator=g) * 10**exponent
    if n > 8:
        w[1], w[3], w[5], w[7] = 0.0, -0.0, torch.inf, torch.nan
        w[n // 2 :: 7] *= 1e-30
        w[n // 3] = 6e4
    return w.to(dtype)


def interpreted(backend: str | Backend, device: torch.device) -> bool:
    """Whether every launch is interpreted."""
    return backend == "triton" and device.type == "cpu"


def placed(t: torch.Tensor, before: int, device: torch.device) -> torch.Tensor:
    """A copy that begins after so many elements of its storage, which is aligned."""
    copy = torch.empty(before + t.numel(), dtype=t.dtype, device=device)[before:]
    return copy.copy_(t)


def table(
    dtype: torch.dtype, kind: MaskKind, *, in_place: bool, shards: Sequence[tuple[int, ...]] = SHARDS
) -> list[Entry]:
    """An entry for each shard, with parameter ids, rows and masks that differ."""
    entries, cpu = [], torch.device("cpu")
    for i, shard in enumerate(Shard(*shard) for shard in shards):
        w, n = weights(shard.n, dtype, i), shard.n
        src = placed(w, max(shard.dst, shard.src) if in_place else shard.src, cpu)
        dst = src if in_place else placed(torch.full_like(w, torch.nan), shard.dst, cpu)
        g = torch.Generator().manual_seed(i)
        mask_tensor = None
        if kind is MaskKind.BOOL:
            mask_tensor = placed(torch.rand(n, generator=g) < 0.5, shard.mask, cpu)
        elif kind in (MaskKind.BITS, MaskKind.RECORD):
            bits = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=g)
            mask_tensor = placed(bits, shard.mask, cpu)
        entries.append(Entry(dst, src, (2654435761 * i) % 2**32, shard.offset, i % 2, kind, 1e-3 * i, mask_tensor))
    return entries


def to(entries: list[Entry], device: torch.device) -> list[Entry]:
    """A copy of the entries, on a device; in-place ones stay in place, and what is not aligned is not."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        return placed(t, t.storage_offset() % 16, device)

    moved = []
    for e in entries:
        src = copy(e.src)
        dst = src if e.dst is e.src else copy(e.dst)
        moved.append(replace(e, src=src, dst=dst, mask_tensor=None if e.mask_tensor is None else copy(e.mask_tensor)))
    return moved


def a_pass(directions: int, rounding: str, decay: float = 1.0, distribution: str = "normal") -> Pass:
    """Two rows of scales, with as many directions as asked."""
    rows = [SCALES[:directions], [-2.0 * s for s in SCALES[:directions]]]
    return Pass(SEEDS[:directions], rows, [decay, 1.0], rounding == "stochastic", distribution=distribution)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor on the CPU, with one NaN for all (a NaN's payload is not specified)."""
    t = t.detach().cpu()
    if not t.is_floating_point():
        return t
    t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def assert_same_bits(got: list[Entry], want: list[Entry]) -> None:
    """Weights and recorded masks agree to the bit."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        for what in ("dst", "src", "mask_tensor"):
            a, b = getattr(g, what), getattr(w, what)
            if a is None:
                continue
            a, b = bits(a), bits(b)
            wrong = (a != b).nonzero().flatten().tolist()
            assert not wrong, f"{what} of entry {i}, {tuple(a.shape)}, differs at {wrong[:8]} ({len(wrong)} in all)"


def check(backend: str | Backend, device: torch.device, entries: list[Entry], do: Pass) -> list[Entry]:
    """Run a pass on a backend and on the reference, from equal copies, and compare. Returns what the backend made."""
    want, got = to(entries, torch.device("cpu")), to(entries, device)
    reference.prepare(want)(do)
    resolved(backend, device).prepare(got)(do)
    assert_same_bits(got, want)
    return got


def resolved(backend: str | Backend, device: torch.device) -> Backend:
    """The backend of a name, or a stand-in as it is."""
    return backends.resolve(backend, device) if isinstance(backend, str) else backend


def check_case(
    backend: str | Backend,
    device: torch.device,
    dtype: torch.dtype,
    kind: MaskKind,
    rounding: str,
    in_place: bool,
    distribution: str = "normal",
) -> None:
    """One case of the matrix: all shards, by a pass that is plain or one with a decay and further directions; on a GPU,
    where that makes another kernel, by both.
    """
    for plain in [True, False] if device.type == "cuda" else [in_place == (rounding == "nearest")]:
        entries, do, want = case(dtype, kind, rounding, in_place, distribution, plain, interpreted(backend, device))
        got = to(entries, device)
        resolved(backend, device).prepare(got)(do)
        assert_same_bits(got, want)


@lru_cache(maxsize=8)  # several backends are compared with it, one after the other
def case(
    dtype: torch.dtype, kind: MaskKind, rounding: str, in_place: bool, distribution: str, plain: bool, few: bool
) -> tuple[list[Entry], Pass, list[Entry]]:
    """A table, a pass, and what the reference makes of them. Nobody may write to it.

    Args:
        few: whether only the shards for an interpreter, to which a direction costs as much as another block.
    """
    shards = interpreted_shards(plain, distribution) if few else SHARDS
    entries = table(dtype, kind, in_place=in_place, shards=shards)
    more = 3 if not few else 2 if kind is MaskKind.NONE else 1
    do = replace(a_pass(1, rounding) if plain else a_pass(more, rounding, decay=0.9), distribution=distribution)
    want = to(entries, torch.device("cpu"))
    reference.prepare(want)(do)
    return entries, do, want


def check_far_chunk(
    backend: str | Backend,
    device: torch.device,
    kind: MaskKind,
    start: int,
    n: int,
    block: int,
    distribution: str = "normal",
) -> None:
    """Run one chunk of a tensor of start + n elements, its last n, which are all the memory that it has.

    Args:
        start: where the chunk begins.
        block: elements that the backend's programs work on at a time.
    """
    [entry] = table(torch.bfloat16, kind, in_place=True, shards=[(n, 0)])
    do = a_pass(1, "stochastic", distribution=distribution)
    [want] = to([replace(entry, offset=start)], torch.device("cpu"))
    reference.prepare([want])(do)

    bytes_before = [2 * start, 2 * start, start if kind is MaskKind.BOOL else start // 8]
    w = _behind(entry.src, bytes_before[0], device)
    mask_tensor = None if entry.mask_tensor is None else _behind(entry.mask_tensor, bytes_before[2], device)
    got = replace(entry, dst=w, src=w, mask_tensor=mask_tensor)

    def launches(made: GpuTable, do: Pass) -> Iterator[tuple[Group, Work]]:
        [group] = made.groups
        group.rows -= torch.tensor([[*bytes_before, -start, 0, 0, 0, 0]], device=device)
        # So that program 0 has this chunk.
        first_chunk = [-(start // (block * group.blocks_per_chunk)), 1]
        numbers = torch.tensor([0, *first_chunk], dtype=torch.int32, device=device)
        yield group, Work(numbers[:1], numbers[1:], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuTable, "launches", launches)
        resolved(backend, device).prepare([got])(do)
    assert_same_bits([got], [want])


def _behind(t: torch.Tensor, before: int, device: torch.device) -> torch.Tensor:
    """A copy; on a CPU behind so many bytes that wrong accesses may go to: of address space, not of memory."""
    if device.type != "cpu":
        return t.to(device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.11
    space = torch.frombuffer(mmap.mmap(-1, before + t.nbytes, flags=flags), dtype=torch.uint8)
    return space[before:].view(t.dtype).copy_(t)
