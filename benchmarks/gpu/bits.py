"""`bits`: the noise and the passes of the fast backends against the CPU's, bit for bit.

AVX-512 first, which any machine with such a processor can check, then each GPU backend. The tests compare few elements
with the slow reference; this suite compares many with kernels that the tests hold to the reference.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from zo_kernels import backends
from zo_kernels.backends.types import Entry, MaskKind, Pass
from zo_kernels.ops import Table, noise
from zo_kernels.spec import DISTRIBUTIONS

from ..bench.registry import Case, Row, Wrong
from ..kernels.cases import DTYPES, facts_of, unusable

_COMPARED = ("native:avx512", "triton", "cuda")
_TRUSTED = ("native:avx2", "native:scalar", "reference")  # the first one available
_SEED, _PARAM_ID = 2**63 + 5, 7
_NOISE, _PASSES = 20_005, 2**18  # elements, if as many are asked for
# Where the high half of a distribution's counters changes, and where a range begins within a counter.
_OFFSETS = {"normal": (0, 2**34 - 4096, 5), "rademacher": (0, 2**35 - 4096, 2**39 - 4096, 5)}
# Of signs few, since each mask is another kernel to compile; more directions than those whose words are made together.
_KINDS = {"normal": tuple(MaskKind), "rademacher": (MaskKind.NONE, MaskKind.RECORD)}
_DIRECTIONS = {"normal": 2, "rademacher": 10}
_SHORT = (4099, 8, 1, 2048 * 3 + 8)  # lengths of the other tensors of a pass
_STD, _THRESHOLD = 0.02, 0.01
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_CPU = torch.device("cpu")


def cases(options: Namespace) -> list[Case]:
    trusted = next(name for name in _TRUSTED if name in backends.available(_CPU))
    of_noise, of_passes = (min(most, options.elements) for most in (_NOISE, _PASSES))
    asked: list[tuple[str, Callable[..., None], str, int]] = []
    for z, dtype in product(DISTRIBUTIONS, DTYPES):
        name = dtype if z == "normal" else f"{dtype}/{z}"
        asked.append((f"noise/{name}", partial(_noise, z, _OFFSETS[z]), dtype, of_noise))
        asked.append((f"passes/{name}", partial(_passes, z), dtype, of_passes))
    asked.append(("long", partial(_noise, "normal", (0,)), "fp32", options.elements))
    found = []
    for backend in _COMPARED:
        device = _CPU if backend.startswith("native") else torch.device(options.device)
        reason = unusable(backend, device)
        for name, compare, dtype, n in asked:
            facts = {"backend": backend, "compared_with": trusted, "elements": n, **facts_of(device, DTYPES[dtype])}
            slow = "the reference would take minutes" if (name, trusted) == ("long", "reference") else reason
            measure = partial(_measure, options.threads, compare, backend, trusted, device, DTYPES[dtype], n)
            found.append(Case(f"{backend}/{name}", facts, measure, slow))
    return found


def _measure(threads: int, compare: Callable[..., None], *what: object) -> list[Row]:
    torch.set_num_threads(threads)
    compare(*what)
    return [{"correct": True}]


def _noise(
    distribution: str,
    offsets: Sequence[int],
    backend: str,
    trusted: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
) -> None:
    """Ranges of the noise that begin at different indices."""
    for offset in offsets:
        make = partial(noise, n, seed=_SEED, param_id=_PARAM_ID, offset=offset, dtype=dtype, distribution=distribution)
        _same(make(device=device, backend=backend), make(backend=trusted), f"the noise from {offset} on")


def _passes(distribution: str, backend: str, trusted: str, device: torch.device, dtype: torch.dtype, n: int) -> None:
    """Passes of several directions with decay, of masks and roundings, one after the other on the same weights."""
    generator = torch.Generator().manual_seed(0)
    lengths = (n, *_SHORT)
    weights = [torch.randn(length, generator=generator).mul(_STD).to(dtype) for length in lengths]
    # Random bytes: bools use the lowest bit of a byte, other masks all bits.
    masks = [torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator) for length in lengths]
    here, there = ([[t.to(where, copy=True) for t in ts] for ts in (weights, masks)] for where in (device, _CPU))
    for rounding in ("nearest", "stochastic"):
        for kind in _KINDS[distribution]:
            for (w, m), name in ((here, backend), (there, trusted)):
                _pass(w, m, kind, rounding, distribution, name)
            for what, got, want in zip(("weights", "masks"), here, there, strict=True):
                for i, (a, b) in enumerate(zip(got, want, strict=True)):
                    _same(a, b, f"the {what} of tensor {i} after {kind.name.lower()}, {rounding}")


def _pass(
    weights: list[Tensor], masks: list[Tensor], kind: MaskKind, rounding: str, distribution: str, backend: str
) -> None:
    entries = []
    for i, (w, mask) in enumerate(zip(weights, masks, strict=True)):
        own = None
        if kind is MaskKind.BOOL:
            own = (mask & 1).bool()
        elif kind in (MaskKind.BITS, MaskKind.RECORD):
            own = mask[: (w.numel() + 7) // 8]
        entries.append(Entry(w, w, 3 + i, 0, i % 2, kind, _THRESHOLD, own))
    n = _DIRECTIONS[distribution]
    scales = [[1e-3, -2e-3] * (n // 2), [0.5, 1e-4] * (n // 2)]
    do = Pass(range(5, 5 + n), scales, [0.999, 1.0], rounding == "stochastic", distribution=distribution)
    Table(entries, [str(i) for i in range(len(entries))], backend).apply(do)


def _same(got: Tensor, want: Tensor, of: str) -> None:
    bits = _BITS[want.element_size()]
    off = (got.cpu().view(bits) != want.view(bits)).nonzero().flatten()
    if off.numel():
        raise Wrong(f"{off.numel()} of {want.numel()} elements differ, first {int(off[0])}, of {of}")


def cells(row: Row) -> dict[str, str]:
    return {"against": row["compared_with"]}
