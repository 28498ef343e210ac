"""From a table of tensors to kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import device

from ..gpu_table import BLOCK, Coefficients, GpuTable, Group, Work
from ..types import Entry, Pass

COUNTERS = BLOCK // 4
WARPS = 4  # so that a thread has 16 elements of a block
# The interpreter pays for each operation of a block, whatever its size.
INTERPRETER_COUNTERS = 1 << 16

OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}


def unavailable(where: device) -> str | None:
    """Why Triton cannot run on that device here, or None if it can."""
    try:
        import triton
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
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):  # loops of the older one fail with numpy 2.4
        return f"Triton's interpreter is needed in version 3.7 or later, got {triton.__version__}"
    return None


def target() -> str:
    """For what the kernels of this process are built: "cuda", "hip" or "interpreter"."""
    from triton import JITFunction

    from .kernels import axpy_kernel

    if not isinstance(axpy_kernel, JITFunction):
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def prepare(entries: Sequence[Entry]) -> Callable[[Pass], None]:
    """Build the table once; the result applies a pass to it, on the current stream: see `gpu_table`.

    It changes the active entries' dst, and the mask_tensor of those that record.
    """
    here = target()
    counters = COUNTERS
    if here == "interpreter":
        largest = max((entry.dst.numel() for entry in entries), default=0)
        counters = min(INTERPRETER_COUNTERS, 1 << max(6, (largest // 4).bit_length()))
    table = GpuTable(entries, 4 * counters)
    where = entries[0].dst.device if entries else None

    def run(do: Pass) -> None:
        if where is None:
            return
        with _context(where, here):
            numbers = Coefficients.of(do, where)
            for entry in table.recorded_apart(do):
                _record(entry, 4 * counters, here)
            for group, work in table.launches(do):
                _launch(group, work, numbers, do.stochastic, counters, here)

    return run


def _context(where: device, here: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    if where.type == "cuda":
        stack.enter_context(torch.cuda.device(where))
    if here == "interpreter":
        import numpy

        stack.enter_context(numpy.errstate(all="ignore"))  # a GPU does not warn of infinities either
    return stack


def _launch(group: Group, work: Work, numbers: Coefficients, stochastic: bool, counters: int, here: str) -> None:
    import triton.language as tl

    from .kernels import axpy_kernel

    axpy_kernel[(work.programs,)](
        group.rows,
        work.ids,
        work.first_chunk,
        work.ids.numel(),
        group.blocks_per_chunk,
        numbers.seeds,
        numbers.scales,
        numbers.decays,
        numbers.seeds.numel(),
        DTYPE=getattr(tl, str(group.dtype).removeprefix("torch.")),
        MASK=int(group.mask),
        STOCHASTIC=stochastic and group.dtype != torch.float32,
        DECAY=numbers.decay,
        IN_PLACE=group.in_place,
        ALIGNED=group.aligned,
        COUNTERS=counters,
        TARGET=here,
        **OPTIONS,
    )


def _record(entry: Entry, block: int, here: str) -> None:
    from .kernels import record_kernel

    assert entry.mask_tensor is not None
    numel = entry.dst.numel()
    record_kernel[(-(-numel // block),)](
        entry.src.detach(), entry.mask_tensor, entry.threshold, numel, BLOCK=block, TARGET=here, **OPTIONS
    )
