"""Is a pass right? Windows of what it writes are compared with the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zo_kernels.backends import reference
from zo_kernels.backends.types import Entry, MaskKind, Pass

_WINDOW = 4096
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def wrong_pass(entries: Sequence[Entry], do: Pass, run: Callable[[], object]) -> str | None:
    """Run a pass over the entries of a table, and say where its result differs from the reference's, or None.

    Of each tensor the first, the middle and the last elements are compared, with the mask bits that the pass records.
    Entries that the pass leaves out must keep their bits.
    """
    windows = [(i, *window) for i, e in enumerate(entries) for window in _windows(e.dst.numel())]
    before = [_cut(entries[i], start, stop) for i, start, stop in windows]
    run()
    for (i, start, stop), expected in zip(windows, before, strict=True):
        if do.active is None or i in do.active:
            reference.prepare([expected])(replace(do, active=None))
        got = _cut(entries[i], start, stop)
        if wrong := differing(got.dst, expected.dst):
            return f"{wrong} of the elements {start} to {stop - 1} are not the reference's"
        masks = got.mask_tensor, expected.mask_tensor
        if masks[0] is not None and masks[1] is not None and (wrong := differing(masks[0], masks[1])):
            return f"{wrong} bytes of the mask of elements {start} to {stop - 1} are not the reference's"
    return None


def differing(got: Tensor, expected: Tensor) -> int:
    """How many elements have other bits."""
    words = _WORDS[got.element_size()]
    return int((got.detach().view(words) != expected.detach().view(words)).sum())


def _windows(elements: int) -> list[tuple[int, int]]:
    """The first, the middle and the last elements; windows begin on a byte of mask bits."""
    size = min(_WINDOW, elements)
    starts = {0, (elements - size) // 16 * 8, (elements - size) // 8 * 8}
    return [(start, elements if start == max(starts) else start + size) for start in sorted(starts)]


def _cut(e: Entry, start: int, stop: int) -> Entry:
    """A copy of a window of an entry on the CPU, as an entry of its own."""

    def copied(tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor.detach().view(-1)[start:stop].cpu().clone()

    dst, mask = copied(e.dst, start, stop), e.mask_tensor
    if mask is not None:
        bits = (start, stop) if e.mask is MaskKind.BOOL else (start // 8, (stop + 7) // 8)
        mask = copied(mask, *bits)
    src = dst if e.src is e.dst else copied(e.src, start, stop)
    return replace(e, dst=dst, src=src, offset=e.offset + start, mask_tensor=mask)
