"""The primitive in plain PyTorch: slow and obvious, on any device. Every other backend is compared with it.

w <- round( decay * w + m . sum_k scale_k * z(seed_k) ), in float32, one fma a direction, one rounding (docs/noise.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, device

from .. import spec
from .fits import Fits
from .types import Entry, MaskKind, Pass

CHUNK = 1 << 16  # elements at a time, a multiple of 8 so that mask bits fall on bytes


def unavailable(where: device) -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def prepare(entries: Sequence[Entry]) -> Callable[[Pass], None]:
    """See `types.Backend`."""
    fits = Fits(entries)

    def run(do: Pass) -> None:
        fits.check(do)
        do = do.on_host()
        for i in range(len(entries)) if do.active is None else do.active:
            _apply(entries[i], do)

    return run


def pack_bits(mask: Tensor) -> Tensor:
    """bool of n elements -> uint8 of ceil(n / 8), lowest bit first."""
    padded = torch.nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, device=mask.device)
    return (padded * weights).sum(1).to(torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """uint8 -> the first n bits as bool, lowest bit first."""
    return ((bits[:, None] >> torch.arange(8, device=bits.device)) & 1).bool().flatten()[:n]


def _mask(entry: Entry, w: Tensor, start: int, stop: int) -> Tensor | None:
    bits = slice(start // 8, (stop + 7) // 8)
    match entry.mask:
        case MaskKind.NONE:
            return None
        case MaskKind.BOOL:
            assert entry.mask_tensor is not None
            return entry.mask_tensor.view(-1)[start:stop]
        case MaskKind.BITS:
            assert entry.mask_tensor is not None
            return unpack_bits(entry.mask_tensor[bits], stop - start)
    mask = w.abs() <= torch.tensor(entry.threshold, dtype=torch.float32, device=w.device)
    if entry.mask is MaskKind.RECORD:
        assert entry.mask_tensor is not None
        entry.mask_tensor[bits] = pack_bits(mask)
    return mask


def _apply(entry: Entry, do: Pass) -> None:
    seeds = do.host_seeds
    src, dst = entry.src.detach().view(-1), entry.dst.detach().view(-1)
    scales, decay = do.scales[entry.group], do.decays[entry.group]
    for start in range(0, dst.numel(), CHUNK):
        stop = min(start + CHUNK, dst.numel())
        old = src[start:stop]
        w = old.float()
        mask = _mask(entry, w, start, stop)
        index = torch.arange(start, stop, device=dst.device) + entry.offset
        t = w * torch.tensor(decay, dtype=torch.float32, device=dst.device)
        for seed, scale in zip(seeds, scales, strict=True):
            t = spec.fma(spec.noise(index, seed, entry.param_id, do.distribution), scale, t)
        rounding = "stochastic" if do.stochastic else "nearest"
        new = spec.round_to(t, dst.dtype, rounding, index, seeds[0], entry.param_id, do.distribution)
        dst[start:stop] = new if mask is None else torch.where(mask, new, old)
