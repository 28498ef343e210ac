"""One pass of zo_kernels over one tensor, ready to be timed, and the check of it against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.backends import reference
from zo_kernels.backends.types import Entry, MaskKind, Pass

SEED, PARAM_ID, EPS = 1, 7, 1e-3
ACTIVE = 0.25  # share of the weights that a mask lets through, as Sparse-MeZO's default sparsity of 0.75
STD = 0.02  # of the weights
_THRESHOLD = 0.318639364 * STD  # a quarter of a normal's values are nearer to 0
_WINDOW = 4096
_PIECES = 16  # blocks of a model of which some are dropped


@dataclass(frozen=True)
class Kind:
    """What a pass does, apart from the tensor it does it to."""

    mask: str = "none"
    directions: int = 1
    rounding: str = "nearest"
    dropped: float = 0.0


def weights(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(elements, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)


def _mask(kind: MaskKind, w: Tensor) -> Tensor | None:
    generator = torch.Generator(w.device).manual_seed(1)
    if kind is MaskKind.BOOL:
        return torch.empty(w.numel(), dtype=torch.bool, device=w.device).bernoulli_(ACTIVE, generator=generator)
    if kind in (MaskKind.BITS, MaskKind.RECORD):
        shape = (2, (w.numel() + 7) // 8)
        first, second = torch.randint(0, 256, shape, dtype=torch.uint8, device=w.device, generator=generator)
        return first & second  # a bit is set in both in a quarter of the cases
    return None


def _windows(elements: int) -> list[tuple[int, int]]:
    """Ranges at the beginning, in the middle and at the end; they begin on a byte of mask bits."""
    size = min(_WINDOW, elements)
    starts = {0, (elements - size) // 16 * 8, (elements - size) // 8 * 8}
    return [(start, elements if start == max(starts) else start + size) for start in sorted(starts)]


class KernelCall:
    """w <- round(w + m . sum_k ±ε z_k), with the sign changing from call to call, so that weights do not wander off.

    The tables are built once, as the optimizers do. Where a share is dropped, the tensor is a row of blocks, of which
    that share, spread evenly, is not visited.
    """

    def __init__(self, w: Tensor, kind: Kind, backend: str):
        mask = MaskKind[kind.mask.upper()]
        pieces = w.chunk(_PIECES) if kind.dropped else [w]
        dropped = min(round(kind.dropped * len(pieces)), len(pieces) - 1)
        every = range(len(pieces))
        self._active = [i for i in every if (i + 1) * dropped // len(pieces) == i * dropped // len(pieces)]
        self.entries = [
            Entry(part, part, PARAM_ID + i, mask=mask, threshold=_THRESHOLD, mask_tensor=_mask(mask, part))
            for i, part in enumerate(pieces)
        ]
        active = self._active if kind.dropped else None
        seeds = [SEED + k for k in range(kind.directions)]
        self._passes = [
            Pass(seeds, [[s] * len(seeds)], [1.0], kind.rounding == "stochastic", active)
            for s in (EPS / len(seeds), -EPS)
        ]
        self._turn = 0
        self._apply = ops.Table(self.entries, [f"w[{i}]" for i in every], backend).apply

    def run(self) -> None:
        self._apply(self._passes[self._turn])
        self._turn ^= 1

    def mask_of_baseline(self) -> Callable[[], Tensor]:
        """The mask of the one tensor as other code needs it: a bool tensor, which a threshold takes a pass to make."""
        (e,) = self.entries
        if e.mask_tensor is not None:
            return lambda: e.mask_tensor
        return lambda: e.src.abs() <= e.threshold

    @property
    def elements(self) -> int:
        """That a call visits."""
        return sum(self.entries[i].dst.numel() for i in self._active)

    @property
    def bytes_moved(self) -> int:
        """Each weight visited is read and written, and its share of the mask is read or written."""
        visited = [self.entries[i] for i in self._active]
        masks = [e.mask_tensor for e in visited if e.mask_tensor is not None]
        return sum(2 * e.dst.nbytes for e in visited) + sum(mask.nbytes for mask in masks)

    def check(self) -> str | None:
        """Do both calls, and hold windows of the result against the reference, bit for bit."""
        looked_at = set(range(len(self.entries))) - set(self._active[1:-1])  # the reference takes its time
        windows = [(i, *window) for i in sorted(looked_at) for window in _windows(self.entries[i].dst.numel())]
        for _ in self._passes:
            do, before = self._passes[self._turn], [self._cut(*window) for window in windows]
            self.run()
            for (i, start, stop), expected in zip(windows, before, strict=True):
                if i in self._active:
                    reference.prepare([expected])(replace(do, active=None))
                got = self._cut(i, start, stop)
                if wrong := _differences(got.dst, expected.dst):
                    return f"{wrong} of the elements {start} to {stop - 1} are not the reference's"
                if got.mask_tensor is not None and (wrong := _differences(got.mask_tensor, expected.mask_tensor)):
                    return f"{wrong} bytes of the mask of elements {start} to {stop - 1} are not the reference's"
        return None

    def _cut(self, i: int, start: int, stop: int) -> Entry:
        """A copy of a window of an entry on the CPU, as an entry of its own."""
        e = self.entries[i]
        part = e.dst[start:stop].cpu().clone()
        mask = e.mask_tensor
        if mask is not None:
            mask = mask[start:stop] if e.mask is MaskKind.BOOL else mask[start // 8 : (stop + 7) // 8]
            mask = mask.cpu().clone()
        return replace(e, dst=part, src=part, offset=e.offset + start, mask_tensor=mask)


def _differences(got: Tensor, expected: Tensor | None) -> int:
    """How many elements differ in their bits."""
    assert expected is not None
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[got.element_size()]
    return int((got.view(bits) != expected.view(bits)).sum())
