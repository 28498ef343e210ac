"""Tensors that are dense but not contiguous, such as channels_last ones, on backends that take contiguous ones alone.

A stretch of elements that follow each other by their logical index is copied to contiguous memory, changed there, and
copied back. So every backend has all layouts, and no kernel knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, device

from ..layouts import ALIGNMENT, stretches
from ..modes import inference_mode
from .fits import MASKED, Checked, Fits
from .types import Backend, Entry, MaskKind, Pass

MOST_BYTES = 2**24  # at a time: enough for few launches


def is_staged(entry: Entry) -> bool:
    """Whether the entry is not contiguous."""
    return not (entry.dst.is_contiguous() and entry.src.is_contiguous())


class Staging:
    """Contiguous memory on each device where it is needed, as much as the tensors take, and at most `MOST_BYTES` (or
    what cannot be cut). Tables whose passes follow each other on one stream may share it.
    """

    def __init__(self) -> None:
        self._memory: dict[device, list[Tensor]] = {}

    def take(self, where: device, nbytes: int) -> Tensor:
        """uint8 (nbytes,). It is the same memory at every call with no more bytes."""
        kept = self._memory.setdefault(where, [])
        fitting = [memory for memory in kept if memory.numel() >= nbytes]
        if not fitting:
            with inference_mode(False):
                fitting = [torch.empty(nbytes, dtype=torch.uint8, device=where)]
            kept += fitting  # the smaller one stays where it is: there are tables with its address
        return fitting[0][:nbytes]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Stretches that have room side by side.

    Attributes:
        run: changes all of them, or those that are active.
        owners: for each stretch its entry's index in the table.
        places: (dst, src, its contiguous memory) of each.
    """

    run: Callable[[Pass], None]
    owners: list[int]
    places: list[tuple[Tensor, Tensor, Tensor]]


def prepare(backend: Backend, entries: Checked, staging: Staging | None = None) -> Callable[[Pass], None]:
    """As `Backend.prepare`, of entries of any dense layout.

    Args:
        staging: memory to share with other tables; None for memory of its own.
    """
    staged = [i for i, e in enumerate(entries) if is_staged(e)]
    if not staged or getattr(backend, "takes_any_layout", False):
        return backend.prepare(entries)
    plain = [i for i, e in enumerate(entries) if not is_staged(e)]
    run_plain = backend.prepare(Checked(entries[i] for i in plain)) if plain else None
    batches = _batches(backend, entries, staged, staging or Staging())
    fits, inference = Fits(entries), entries[0].dst.is_inference()

    def run(do: Pass) -> None:
        fits.check(do)  # the whole of it, before anything is changed
        active = None if do.active is None else set(do.active)
        if run_plain is not None and (some := _among(plain, do, active)) is not None:
            run_plain(some)
        for batch in batches:
            if (some := _among(batch.owners, do, active)) is None:
                continue
            places = batch.places if some.active is None else [batch.places[i] for i in some.active]
            with inference_mode(inference):  # inference tensors cannot be written to elsewhere
                for _, src, memory in places:
                    memory.copy_(src)
                batch.run(some)
                for dst, _, memory in places:
                    dst.copy_(memory)

    return run


def _among(owners: Sequence[int], do: Pass, active: set[int] | None) -> Pass | None:
    """The pass for entries that are these of the table's; None if none of them is active."""
    if active is None:
        return do
    some = [place for place, i in enumerate(owners) if i in active]
    return replace(do, active=some) if some else None


def _batches(backend: Backend, entries: Sequence[Entry], staged: Sequence[int], staging: Staging) -> list[_Batch]:
    cut = [(i, *each) for i in staged for each in _cut(entries[i])]
    sizes = [-(-e.dst.nbytes // ALIGNMENT) * ALIGNMENT for _, e, _, _ in cut]
    batches: list[list[int]] = [[]]
    used = 0
    for at, size in enumerate(sizes):
        if batches[-1] and used + size > MOST_BYTES:
            batches.append([])
            used = 0
        batches[-1].append(at)
        used += size
    memory = staging.take(entries[0].dst.device, max(sum(sizes[at] for at in batch) for batch in batches))
    made = []
    for batch in batches:
        start, pieces, places = 0, [], []
        for at in batch:
            _, entry, dst, src = cut[at]
            with inference_mode(False):  # where a view of another dtype would be an inference tensor
                flat = memory[start : start + dst.nbytes].view(dst.dtype)
            pieces.append(replace(entry, dst=flat, src=flat))
            places.append((dst, src, flat.view(dst.shape)))
            start += sizes[at]
        made.append(_Batch(backend.prepare(Checked(pieces)), [cut[at][0] for at in batch], places))
    return made


def _cut(entry: Entry) -> list[tuple[Entry, Tensor, Tensor]]:
    """Stretches of an entry, each with its part of dst and src."""
    dst, src, mask = entry.dst.detach(), entry.src.detach(), entry.mask_tensor
    found = []
    # At whole bytes of mask bits, and where wide accesses can begin.
    for start, index in stretches(dst.shape, MOST_BYTES // dst.element_size(), 8):
        part = dst[index]
        end = start + part.numel()
        masked = None
        if mask is not None and entry.mask in MASKED:
            masked = mask.view(-1)[start:end] if entry.mask is MaskKind.BOOL else mask[start // 8 : -(-end // 8)]
        found.append((replace(entry, dst=part, offset=entry.offset + start, mask_tensor=masked), part, src[index]))
    return found
