"""Dense tensors that are not contiguous, such as channels_last ones, for backends that need contiguous ones.

A stretch of elements with consecutive logical indices is copied to contiguous memory, changed there and copied back. So
every backend takes every layout, and no kernel knows of layouts.
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

MOST_BYTES = 2**24  # copied at a time: enough to need few launches


def is_staged(entry: Entry) -> bool:
    """Whether the entry is not contiguous."""
    return not (entry.dst.is_contiguous() and entry.src.is_contiguous())


class Staging:
    """Contiguous memory on each device that needs it: as much as the tensors take, at most `MOST_BYTES` (or the longest
    stretch that cannot be cut). Tables whose passes follow each other on one stream may share it.
    """

    def __init__(self) -> None:
        self._memory: dict[device, list[Tensor]] = {}

    def take(self, where: device, nbytes: int) -> Tensor:
        """uint8 (nbytes,). Calls that need no more bytes get the same memory."""
        kept = self._memory.setdefault(where, [])
        fitting = [memory for memory in kept if memory.numel() >= nbytes]
        if not fitting:
            with inference_mode(False):
                fitting = [torch.empty(nbytes, dtype=torch.uint8, device=where)]
            kept += fitting  # the smaller one stays: some tables have its address
        return fitting[0][:nbytes]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Stretches that are copied together.

    Attributes:
        run: applies a pass to all of them, or to the active ones.
        owners: for each stretch, the index of its entry in the table.
        places: (dst, src, contiguous memory) of each stretch.
    """

    run: Callable[[Pass], None]
    owners: list[int]
    places: list[tuple[Tensor, Tensor, Tensor]]


def prepare(backend: Backend, entries: Checked, staging: Staging | None = None) -> Callable[[Pass], None]:
    """`Backend.prepare` for entries of any dense layout.

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
        fits.check(do)  # all of it, before anything is changed
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
    """The part of a pass that concerns these entries of the table; None if none of them is active."""
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
            with inference_mode(False):  # so that the view is no inference tensor
                flat = memory[start : start + dst.nbytes].view(dst.dtype)
            pieces.append(replace(entry, dst=flat, src=flat))
            places.append((dst, src, flat.view(dst.shape)))
            start += sizes[at]
        made.append(_Batch(backend.prepare(Checked(pieces)), [cut[at][0] for at in batch], places))
    return made


def _cut(entry: Entry) -> list[tuple[Entry, Tensor, Tensor]]:
    """The stretches of an entry, each as an entry, with its views of dst and src."""
    dst, src, mask = entry.dst.detach(), entry.src.detach(), entry.mask_tensor
    found = []
    # Stretches begin at whole bytes of mask bits, where wide accesses can begin too.
    for start, index in stretches(dst.shape, MOST_BYTES // dst.element_size(), 8):
        part = dst[index]
        end = start + part.numel()
        masked = None
        if mask is not None and entry.mask in MASKED:
            masked = mask.view(-1)[start:end] if entry.mask is MaskKind.BOOL else mask[start // 8 : -(-end // 8)]
        found.append((replace(entry, dst=part, offset=entry.offset + start, mask_tensor=masked), part, src[index]))
    return found
