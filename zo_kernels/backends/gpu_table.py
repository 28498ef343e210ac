"""The table of the GPU backends (Triton and CUDA C++): tensors described in device memory, and the numbers of a pass.

A pass is one launch for each dtype, kind of mask and alignment, for any number of entries: a program finds its tensor
in the table. Everything that changes from pass to pass is copied to device memory without waiting, and read there.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, device

from . import tuning
from .fits import check_on, rows_of
from .transfer import on_device, signed
from .types import Entry, MaskKind, Pass

BLOCK = 2048  # elements that a program works on at a time
FIELDS = 8  # int64 words of a row: see `_row`
ALIGNED = 1  # the flag of a row
_ENOUGH_PROGRAMS = 8192  # so many keep all multiprocessors busy
# In a launch, a GPU's limit. So 32 bits number the chunks, and the elements within one; where a chunk starts takes 64.
MOST_PROGRAMS = 2**31 - 1
_RECORDED_BY_PROGRAM = 1024  # elements, in the launch for an entry that is recorded apart; more in some backends


def is_aligned(entry: Entry) -> bool:
    """Whether whole 128-bit accesses cover the weights, and whole bytes of mask bits (or aligned groups of eight bools)
    belong to each.
    """
    pointers = entry.dst.data_ptr() | entry.src.data_ptr()
    if entry.mask is MaskKind.BOOL:
        assert entry.mask_tensor is not None
        pointers |= 2 * entry.mask_tensor.data_ptr()
    return entry.dst.numel() % 8 == 0 and entry.offset % 8 == 0 and pointers % 16 == 0


def _row(entry: Entry) -> list[int]:
    """Addresses of dst, src, mask; numel; offset; param_id | group << 32; bits of the threshold | flags << 32; 0."""
    mask = 0 if entry.mask_tensor is None else entry.mask_tensor.data_ptr()
    (threshold,) = struct.unpack("<I", struct.pack("<f", ctypes.c_float(entry.threshold).value))
    words = [
        entry.dst.data_ptr(),
        entry.src.data_ptr(),
        mask,
        entry.dst.numel(),
        entry.offset,
        entry.param_id | entry.group << 32,
        threshold | (ALIGNED if is_aligned(entry) else 0) << 32,
        0,
    ]
    return [signed(w) for w in words]


class Work:
    """The programs of a launch. Program p works on entry ids[e] with first_chunk[e] <= p < first_chunk[e + 1].

    Attributes:
        ids: int32 (active,), rows of the table.
        first_chunk: int32 (active + 1,).
        addresses: the addresses of these two.
        active, programs: their numbers.
    """

    def __init__(self, ids: Tensor, first_chunk: Tensor, programs: int):
        self.ids, self.first_chunk, self.programs = ids, first_chunk, programs
        self.active, self.addresses = ids.numel(), (ids.data_ptr(), first_chunk.data_ptr())


class Group:
    """Entries of one dtype, kind of mask and alignment.

    Chunks divide the counters, not the tensors: chunk c of an entry has the elements whose index i in the whole
    parameter satisfies i // size = offset // size + c, with size = block * blocks_per_chunk.

    Attributes:
        rows: int64 (entries, FIELDS) on the device.
        address: the address of the rows.
        aligned: `is_aligned`. Other entries have a kernel of their own, because one kernel for both would need the
            registers of the slower one everywhere.
        in_place: whether dst is src in all entries.
        blocks_per_chunk: how many blocks a program takes.
        kernels: a place where the backend may keep the kernels that it compiled for the group.
    """

    def __init__(self, entries: Sequence[tuple[int, Entry]], block: int, blocks_per_chunk: int):
        first, where = entries[0][1], entries[0][1].dst.device
        self.dtype, self.mask = first.dst.dtype, first.mask
        self.aligned = is_aligned(first)
        self.in_place = all(e.dst.data_ptr() == e.src.data_ptr() for _, e in entries)
        self.rows = torch.tensor([_row(e) for _, e in entries], dtype=torch.int64, device=where)
        self.address = self.rows.data_ptr()
        self.blocks_per_chunk = blocks_per_chunk
        self.kernels: dict[Any, Any] = {}
        self._place = {i: place for place, (i, _) in enumerate(entries)}
        touched = [_touched(e, block * blocks_per_chunk) for _, e in entries]
        self._chunks = torch.tensor(touched, dtype=torch.int64, device="cpu")
        # Copied with waiting, since any stream may be the first to read it.
        self._all = self._work(
            range(len(entries)), lambda numbers: torch.tensor(numbers, dtype=torch.int32, device=where)
        )

    def work(self, active: Sequence[int] | None) -> Work | None:
        """The programs for the active entries of the table (None: all); None if none of them is in this group."""
        if active is None:
            return self._all
        places = [self._place[i] for i in active if i in self._place]
        where = self.rows.device
        return self._work(places, lambda numbers: on_device(numbers, torch.int32, where)) if places else None

    def _work(self, places: Sequence[int], put: Callable[[list[int]], Tensor]) -> Work:
        ends = self._chunks[list(places)].cumsum(0).tolist()
        _check_programs(ends[-1])
        numbers = put([*places, 0, *ends])
        return Work(numbers[: len(places)], numbers[len(places) :], ends[-1])


def _touched(entry: Entry, size: int) -> int:
    """How many stretches of `size` elements of the whole parameter the entry touches."""
    return (entry.offset + entry.dst.numel() - 1) // size - entry.offset // size + 1


def _check_programs(programs: int) -> None:
    if programs > MOST_PROGRAMS:
        raise ValueError(f"tensors: expected work for at most {MOST_PROGRAMS} programs of a GPU, got {programs}")


class GpuTable:
    """A table of entries, built once.

    Args:
        entries: of one device.
        block: elements that a program works on at a time; a power of two, at least 8.

    Attributes:
        groups: each takes one launch.
        tuning: the tuning that was current when the table was built.

    Raises:
        ValueError: a launch would have more programs than a GPU can count.
    """

    def __init__(self, entries: Sequence[Entry], block: int = BLOCK):
        # Programs would share bytes of these entries' mask bits. Launches of their own write the bits first, so their
        # group reads BITS.
        self._recorded_apart: dict[int, Entry] = {}
        sorted_out: dict[tuple[torch.dtype, MaskKind, bool], list[tuple[int, Entry]]] = {}
        for i, entry in enumerate(entries):
            if not entry.dst.numel():
                continue
            if entry.mask is MaskKind.RECORD and not is_aligned(entry):
                _check_programs(-(-entry.dst.numel() // _RECORDED_BY_PROGRAM))
                self._recorded_apart[i] = entry
                entry = replace(entry, mask=MaskKind.BITS)
            sorted_out.setdefault((entry.dst.dtype, entry.mask, is_aligned(entry)), []).append((i, entry))
        total = sum(_touched(e, block) for e in entries if e.dst.numel())
        self.tuning = tuning.current()
        blocks_per_chunk = min(1 << (total // _ENOUGH_PROGRAMS | 1).bit_length() - 1, self.tuning.most_blocks)
        self.groups = [Group(members, block, blocks_per_chunk) for members in sorted_out.values()]

    def recorded_apart(self, do: Pass) -> list[Entry]:
        """The active entries whose mask bits launches of their own write before the pass."""
        return [e for i, e in self._recorded_apart.items() if do.active is None or i in do.active]

    def launches(self, do: Pass) -> Iterator[tuple[Group, Work]]:
        """The launches of a pass."""
        for group in self.groups:
            if (work := group.work(do.active)) is not None:
                yield group, work


_NOTHING = nullcontext()


def current(where: device) -> AbstractContextManager[object]:
    """A context in which this device is the current one."""
    if where.type != "cuda" or torch.cuda.current_device() == where.index:
        return _NOTHING  # entering a context would take a good part of a launch's time
    return torch.cuda.device(where)


def stream_of(where: device) -> int:
    """The address of the device's current stream; 0 for a CPU."""
    return torch._C._cuda_getCurrentRawStream(where.index) if where.type == "cuda" else 0


class Coefficients:
    """The numbers of a pass, on the device.

    Attributes:
        seeds: int64 (directions,), the bits of uint64.
        scales: float32 (groups, directions).
        decays: float32 (groups,).
        addresses: the addresses of these three.
        directions: their number.
        decay: False if all decays are known to be 1.

    Raises:
        ValueError: they do not fit each other, or are tensors elsewhere.
    """

    def __init__(self, do: Pass, where: device):
        do.once("rows", rows_of)
        check_on(where, do)
        self.directions = len(do.seeds)
        seeds = [s for s in do.seeds if isinstance(s, Tensor)]
        numbers = [signed(s) for s in do.seeds if not isinstance(s, Tensor)]
        self.seeds = torch.stack(seeds) if seeds else on_device(numbers, torch.int64, where)
        self.scales = _floats(do.scales, where).view(-1, self.directions)
        self.decays = _floats(do.decays, where)
        self.addresses = self.seeds.data_ptr(), self.scales.data_ptr(), self.decays.data_ptr()
        self.decay = isinstance(do.decays, Tensor) or any(d != 1.0 for d in do.decays)

    @staticmethod
    def of(do: Pass, where: device, stream: int) -> Coefficients:
        """The numbers of a pass, copied once for each stream that reads them."""
        return do.once((where, stream), lambda do: Coefficients(do, where))


def _floats(values: Tensor | Sequence[float] | Sequence[Sequence[float]], where: device) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(torch.float32).contiguous()
    flat = [v for row in values for v in (row if isinstance(row, Sequence) else [row])]
    return on_device(flat, torch.float32, where)
