"""The test matrix: which backends, types, sizes and masks there are, and one table of tensors that has them all."""

from __future__ import annotations

from dataclasses import replace

import torch

from zo_kernels import backends
from zo_kernels.backends import reference
from zo_kernels.backends.types import Entry, MaskKind, Pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Native kernels are tested on a machine with a GPU too: the same bits are expected of both.
BACKENDS = [(name, torch.device("cpu")) for name in backends.available(torch.device("cpu")) if name != "reference"]
if DEVICE.type == "cuda":
    BACKENDS += [(name, DEVICE) for name in backends.available(DEVICE) if name != "reference"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS = ["nearest", "stochastic"]

# Lengths and the index of the first element. 2**34 is where a counter's high half changes; kernels work on 16 or 32
# elements, or another power of two, at a time, and on counters of 4.
SHARDS = [
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
    (500, 0),
    (1000, 2**62 + 5),
    (1025, 2),
]
# Triton's interpreter needs a tenth of a second for a launch; these keep one of each kind.
FEW_SHARDS = [(0, 0), (5, 2), (64, 2**34 - 32), (65, 2**34 - 37), (1025, 2)]
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


def shards_for(backend: str, device: torch.device) -> list[tuple[int, int]]:
    """All shards, or few where every launch is interpreted."""
    return FEW_SHARDS if backend == "triton" and device.type == "cpu" else SHARDS


def table(dtype: torch.dtype, kind: MaskKind, *, in_place: bool, shards: list[tuple[int, int]] = SHARDS) -> list[Entry]:
    """An entry for each shard, with parameter ids, rows and masks that differ."""
    entries = []
    for i, (n, offset) in enumerate(shards):
        src = weights(n, dtype, i)
        dst = src if in_place else torch.full_like(src, torch.nan)
        g = torch.Generator().manual_seed(i)
        mask_tensor = None
        if kind is MaskKind.BOOL:
            mask_tensor = torch.rand(n, generator=g) < 0.5
        elif kind in (MaskKind.BITS, MaskKind.RECORD):
            mask_tensor = torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, generator=g)
        entries.append(Entry(dst, src, (2654435761 * i) % 2**32, offset, i % 2, kind, 1e-3 * i, mask_tensor))
    return entries


def to(entries: list[Entry], device: torch.device) -> list[Entry]:
    """A copy of the entries, on a device; in-place ones stay in place."""
    moved = []
    for e in entries:
        src = e.src.to(device, copy=True)
        dst = src if e.dst is e.src else e.dst.to(device, copy=True)
        mask_tensor = None if e.mask_tensor is None else e.mask_tensor.to(device, copy=True)
        moved.append(replace(e, src=src, dst=dst, mask_tensor=mask_tensor))
    return moved


def a_pass(directions: int, rounding: str, decay: float = 1.0) -> Pass:
    """Two rows of scales, with as many directions as asked."""
    rows = [SCALES[:directions], [-2.0 * s for s in SCALES[:directions]]]
    return Pass(SEEDS[:directions], rows, [decay, 1.0], rounding == "stochastic")


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


def check(backend: str, device: torch.device, entries: list[Entry], do: Pass) -> None:
    """Run a pass on a backend and on the reference, from equal copies, and compare."""
    want, got = to(entries, torch.device("cpu")), to(entries, device)
    reference.prepare(want)(do)
    backends.resolve(backend, device).prepare(got)(do)
    assert_same_bits(got, want)
