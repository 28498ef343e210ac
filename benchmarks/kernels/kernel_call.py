"""One pass of zo_kernels over one tensor, ready to be timed, and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_kernels import ops
from zo_kernels.backends.types import Entry, MaskKind, Pass

from .check import wrong_pass

SEED, PARAM_ID, EPS = 1, 7, 1e-3
ACTIVE = 0.25  # share of the weights that a mask keeps; Sparse-MeZO leaves out 0.75 by default
STD = 0.02  # of the weights
_THRESHOLD = 0.318639364 * STD  # a quarter of a normal's values are nearer to 0
_PIECES = 16  # blocks, some of them dropped


@dataclass(frozen=True)
class Kind:
    """What a pass does, apart from the tensor it does it to."""

    mask: str = "none"
    directions: int = 1
    rounding: str = "nearest"
    dropped: float = 0.0
    distribution: str = "normal"


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


class KernelCall:
    """w <- round(w + m . sum_k ±ε z_k). The sign changes from call to call, so that weights do not wander off.

    The tables are built once, as the optimizers do. If a share is dropped, the tensor is cut into blocks, and that
    share of them, spread evenly, is not visited.
    """

    def __init__(self, w: Tensor, kind: Kind, backend: str):
        mask = MaskKind[kind.mask.upper()]
        pieces = w.chunk(_PIECES) if kind.dropped else [w]
        dropped = min(round(kind.dropped * len(pieces)), len(pieces) - 1)
        every = range(len(pieces))
        active = [i for i in every if (i + 1) * dropped // len(pieces) == i * dropped // len(pieces)]
        self.entries = [
            Entry(part, part, PARAM_ID + i, mask=mask, threshold=_THRESHOLD, mask_tensor=_mask(mask, part))
            for i, part in enumerate(pieces)
        ]
        self._visited = [self.entries[i] for i in active]
        seeds = [SEED + k for k in range(kind.directions)]
        scales, stochastic = (EPS / len(seeds), -EPS), kind.rounding == "stochastic"
        left = active if kind.dropped else None
        self._passes = [
            Pass(seeds, [[s] * len(seeds)], [1.0], stochastic, left, distribution=kind.distribution) for s in scales
        ]
        self._turn = 0
        self._apply = ops.Table(self.entries, [f"w[{i}]" for i in every], backend).apply

    def run(self) -> None:
        self._apply(self._passes[self._turn])
        self._turn ^= 1

    def mask_of_baseline(self) -> Callable[[], Tensor]:
        """The mask of the one tensor as other code needs it: a bool tensor. A threshold takes a pass to make it."""
        (e,) = self.entries
        if e.mask_tensor is not None:
            return lambda: e.mask_tensor
        return lambda: e.src.abs() <= e.threshold

    @property
    def elements(self) -> int:
        """How many elements a call visits."""
        return sum(e.dst.numel() for e in self._visited)

    @property
    def bytes_moved(self) -> int:
        """Each weight visited is read and written, and its share of the mask is read or written."""
        return sum(2 * e.dst.nbytes + (0 if e.mask_tensor is None else e.mask_tensor.nbytes) for e in self._visited)

    def check(self) -> str | None:
        """Do both calls, and say where one differs from the reference, or None."""
        for _ in self._passes:
            if wrong := wrong_pass(self.entries, self._passes[self._turn], self.run):
                return wrong
        return None
