"""From a table of tensors to kernel launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, device

from ..types import Entry, MaskKind, Pass

# A GPU's block: 16 elements a thread. With 32, `static` counts a tenth fewer instructions an element, but two to three
# times the registers.
COUNTERS = 512
WARPS = 4
# The interpreter pays for each operation of a block, whatever its size.
INTERPRETER_COUNTERS = 1 << 16

OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}


def unavailable(where: device) -> str | None:
    """Why Triton cannot run on that device here, or None if it can."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return "triton is not installed: pip install triton"
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if where.type == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"
    if where.type != "cpu":
        return f"Triton needs a CUDA or ROCm tensor, got one on {where.type}"
    if target() != "interpreter":
        return "Triton needs a GPU tensor; on a CPU set TRITON_INTERPRET=1 before importing zo_kernels"
    return None


def target() -> str:
    """For what the kernels of this process are built: "cuda", "hip" or "interpreter"."""
    from triton import JITFunction

    from .kernels import axpy_kernel

    if not isinstance(axpy_kernel, JITFunction):
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def prepare(entries: Sequence[Entry]) -> Callable[[Pass], None]:
    """Build the launches once; the result makes them, in the order of the entries, on the current stream.

    It changes the active entries' dst, and the mask_tensor of those that record.
    """
    here = target()
    launches = [_Launch.of(entry, here) for entry in entries]

    def run(do: Pass) -> None:
        active = launches if do.active is None else [launches[i] for i in do.active]
        if not active:
            return
        if not do.seeds:
            raise ValueError("expected at least one direction, got no seeds")
        where = active[0].entry.dst.device
        with _context(where, here):
            coefficients = _Coefficients.of(do, where)
            for launch in active:
                launch(coefficients, do.stochastic)

    return run


def _is_aligned(entry: Entry) -> bool:
    """Whether whole 128-bit accesses and whole bytes of mask bits cover the entry."""
    pointers = entry.dst.data_ptr() | entry.src.data_ptr()
    return entry.dst.numel() % 8 == 0 and entry.offset % 8 == 0 and pointers % 16 == 0


def _context(where: device, here: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    if where.type == "cuda":
        stack.enter_context(torch.cuda.device(where))
    if here == "interpreter":
        import numpy

        stack.enter_context(numpy.errstate(all="ignore"))  # a GPU does not warn of infinities either
    return stack


@dataclass(frozen=True, slots=True)
class _Coefficients:
    """The numbers of a pass, on the device."""

    seeds: Tensor  # uint64 (directions,)
    scales: Tensor  # float32 (groups, directions)
    decays: Tensor  # float32 (groups,)

    @staticmethod
    def of(do: Pass, where: device) -> _Coefficients:
        return _Coefficients(
            torch.tensor(do.seeds, dtype=torch.uint64, device=where),
            torch.tensor(do.scales, dtype=torch.float32, device=where),
            torch.tensor(do.decays, dtype=torch.float32, device=where),
        )


@dataclass(frozen=True, slots=True)
class _Launch:
    """What does not change from pass to pass."""

    entry: Entry
    aligned: bool
    counters: int
    target: str

    @staticmethod
    def of(entry: Entry, here: str) -> _Launch:
        counters = COUNTERS
        if here == "interpreter":
            counters = min(INTERPRETER_COUNTERS, 1 << max(6, (entry.dst.numel() // 4).bit_length()))
        mask = entry.mask_tensor
        raw = replace(
            entry,
            dst=entry.dst.detach(),
            src=entry.src.detach(),
            threshold=ctypes.c_float(entry.threshold).value,
            mask_tensor=None if mask is None else mask.view(torch.uint8),
        )
        return _Launch(raw, _is_aligned(entry), counters, here)

    def __call__(self, coefficients: _Coefficients, stochastic: bool) -> None:
        from .kernels import axpy_kernel, record_kernel

        entry, mask = self.entry, self.entry.mask
        numel, block = entry.dst.numel(), 4 * self.counters
        if numel == 0:
            return
        if mask is MaskKind.RECORD and not self.aligned:
            # Blocks would share bytes of the bits, so these come first, in a launch of their own.
            mask = MaskKind.BITS
            record_kernel[(-(-numel // block),)](
                entry.src, entry.mask_tensor, entry.threshold, numel, BLOCK=block, TARGET=self.target, **OPTIONS
            )
        blocks = (entry.offset + numel - 1) // block - entry.offset // block + 1
        axpy_kernel[(blocks,)](
            entry.dst,
            entry.src,
            entry.mask_tensor,
            entry.threshold,
            numel,
            entry.offset,
            entry.param_id,
            entry.group,
            coefficients.seeds,
            coefficients.scales,
            coefficients.decays,
            coefficients.seeds.numel(),
            MASK=int(mask),
            STOCHASTIC=stochastic and entry.dst.dtype != torch.float32,
            ALIGNED=self.aligned,
            COUNTERS=self.counters,
            TARGET=self.target,
            **OPTIONS,
        )
