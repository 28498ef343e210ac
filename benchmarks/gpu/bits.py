"""`bits`: the noise and the passes of the fast backends against the CPU's, bit for bit.

AVX-512 first, which any machine with such a processor can check, then each GPU backend. The tests compare few elements
with the slow reference; this suite compares many with kernels that the tests hold to the reference.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zo_kernels import backends
from zo_kernels.backends.types import Entry, MaskKind, Pass
from zo_kernels.ops import Table, noise

from ..bench.registry import Case, Row
from ..kernels.cases import DTYPES, unusable

_COMPARED = ("native:avx512", "triton", "cuda")
_TRUSTED = ("native:avx2", "native:scalar", "reference")  # the first one available
_SEED, _PARAM_ID = 2**63 + 5, 7
_NOISE, _PASSES = 20_005, 2**18  # elements, if as many are asked for
_OFFSETS = (0, 2**34 - 4096, 5)  # where a counter's high half changes, and where a range begins within a counter
_SHORT = (4099, 8, 1, 2048 * 3 + 8)  # lengths of the other tensors of a pass
_STD, _THRESHOLD = 0.02, 0.01
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_CPU = torch.device("cpu")

# (backend, trusted backend, device, dtype, elements) -> what differs, or None
_Compare = Callable[[str, str, torch.device, torch.dtype, int], str | None]


def cases(options: Namespace) -> list[Case]:
    trusted = next(name for name in _TRUSTED if name in backends.available(_CPU))
    made = []
    for backend in _COMPARED:
        device = _CPU if backend.startswith("native") else torch.device(options.device)
        reason = unusable(backend, device)
        for kind, compare, most in (("noise", _noise, _NOISE), ("passes", _passes, _PASSES)):
            n = min(most, options.elements)
            made += [_case(f"{kind}/{d}", compare, backend, trusted, device, d, n, options, reason) for d in DTYPES]
        reason = "the reference would take minutes" if trusted == "reference" else reason
        made.append(_case("long", _long, backend, trusted, device, "fp32", options.elements, options, reason))
    return made


def _case(
    name: str,
    compare: _Compare,
    backend: str,
    trusted: str,
    device: torch.device,
    dtype: str,
    elements: int,
    options: Namespace,
    skipped: str | None,
) -> Case:
    def measure() -> list[Row]:
        torch.set_num_threads(options.threads)
        wrong = compare(backend, trusted, device, DTYPES[dtype], elements)
        return [{"correct": not wrong, "wrong": wrong}]

    facts = {"backend": backend, "compared_with": trusted, "device": str(device), "elements": elements}
    facts["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    return Case(f"{backend}/{name}", facts, measure, skipped)


def _noise(backend: str, trusted: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Ranges of the noise that begin at different indices."""
    for offset in _OFFSETS:
        make = partial(noise, n, seed=_SEED, param_id=_PARAM_ID, offset=offset, dtype=dtype)
        if wrong := _differing(make(device=device, backend=backend), make(backend=trusted)):
            return f"{wrong}, of the noise from {offset} on"
    return None


def _long(backend: str, trusted: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """One long range."""
    make = partial(noise, n, seed=1, dtype=dtype)
    return _differing(make(device=device, backend=backend), make(backend=trusted))


def _passes(backend: str, trusted: str, device: torch.device, dtype: torch.dtype, n: int) -> str | None:
    """Passes of two directions with decay, of every mask and rounding, one after the other on the same weights."""
    here, there = _tensors(dtype, n, device), _tensors(dtype, n, _CPU)
    for rounding in ("nearest", "stochastic"):
        for kind in MaskKind:
            for (weights, masks), name in ((here, backend), (there, trusted)):
                _pass(weights, masks, kind, rounding, name)
            for what, got, want in zip(("weights", "masks"), here, there, strict=True):
                for i, (a, b) in enumerate(zip(got, want, strict=True)):
                    if wrong := _differing(a, b):
                        return f"{wrong}, of the {what} of tensor {i} after {kind.name.lower()}, {rounding}"
    return None


def _tensors(dtype: torch.dtype, n: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and random bytes for each of them: bools use the lowest bit of a byte, other masks all bits."""
    generator = torch.Generator().manual_seed(0)
    lengths = (n, *_SHORT)
    weights = [torch.randn(length, generator=generator).mul(_STD).to(dtype) for length in lengths]
    masks = [torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator) for length in lengths]
    return [w.to(device) for w in weights], [mask.to(device) for mask in masks]


def _pass(weights: list[Tensor], masks: list[Tensor], kind: MaskKind, rounding: str, backend: str) -> None:
    entries = []
    for i, (w, mask) in enumerate(zip(weights, masks, strict=True)):
        own = None
        if kind is MaskKind.BOOL:
            own = (mask & 1).bool()
        elif kind in (MaskKind.BITS, MaskKind.RECORD):
            own = mask[: (w.numel() + 7) // 8]
        entries.append(Entry(w, w, 3 + i, 0, i % 2, kind, _THRESHOLD, own))
    do = Pass([5, 6], [[1e-3, -2e-3], [0.5, 1e-4]], [0.999, 1.0], rounding == "stochastic")
    Table(entries, [str(i) for i in range(len(entries))], backend).apply(do)


def _differing(got: Tensor, want: Tensor) -> str | None:
    bits = _BITS[want.element_size()]
    off = (got.cpu().view(bits) != want.view(bits)).nonzero().flatten()
    return f"{off.numel()} of {want.numel()} elements differ, first {int(off[0])}" if off.numel() else None


def cells(row: Row) -> dict[str, str]:
    return {"against": row["compared_with"]}
