"""The launches: from a table of tensors, to the kernels in `kernels`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import device

from ..fits import Fits
from ..gpu_table import BLOCK, Coefficients, GpuTable, Group, Work, current, stream_of
from ..tuning import Tuning
from ..types import Entry, Pass

COUNTERS = BLOCK // 4
# The interpreter's time goes by operations, not by their size, so its blocks are large.
INTERPRETER_COUNTERS = 1 << 16


def options(tuning: Tuning) -> dict[str, Any]:
    """The options that the kernels are compiled with."""
    return {"num_warps": tuning.warps, "num_stages": 1, "enable_fp_fusion": False}


def unavailable(where: device) -> str | None:
    """Why Triton cannot run on that device here, or None if it can."""
    try:
        import triton
    except ModuleNotFoundError:
        return "triton is not installed: pip install triton"
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if where.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no CUDA or ROCm device"
        if version < (3, 6):
            return f"on a GPU Triton is needed in version 3.6 or later (PyTorch 2.11 has it), got {triton.__version__}"
        return None
    if where.type != "cpu":
        return f"Triton needs a CUDA or ROCm tensor, got one on {where.type}"
    if target() != "interpreter":
        return "Triton needs a GPU tensor; on a CPU set TRITON_INTERPRET=1 before importing zo_kernels"
    if version < (3, 7):  # loops of the older one fail with numpy 2.4
        return f"Triton's interpreter is needed in version 3.7 or later, got {triton.__version__}"
    return None


def target() -> str:
    """What this process compiles the kernels for: "cuda", "hip" or "interpreter"."""
    from triton import JITFunction

    from .kernels import axpy_kernel

    if not isinstance(axpy_kernel, JITFunction):
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def prepare(entries: Sequence[Entry]) -> Callable[[Pass], None]:
    """Build a table once and return the function that launches a pass over it on the current stream: see `gpu_table`.

    A pass changes dst of the active entries, and mask_tensor of those that record.
    """
    fits, here = Fits(entries), target()
    counters = COUNTERS
    if here == "interpreter":
        largest = max((entry.dst.numel() for entry in entries), default=0)
        counters = min(INTERPRETER_COUNTERS, 1 << max(6, (largest // 4).bit_length()))
    table = GpuTable(entries, 4 * counters)
    where = entries[0].dst.device if entries else None

    def run(do: Pass) -> None:
        if where is None:
            return
        fits.check(do)
        with _context(where, here):
            stream = stream_of(where)
            numbers = Coefficients.of(do, where, stream)
            for entry in table.recorded_apart(do):
                _record(entry, 4 * counters, here, table.tuning)
            for group, work in table.launches(do):
                stochastic = do.stochastic and group.dtype != torch.float32
                if (kernel := group.kernels.get((do.distribution, stochastic, numbers.decay))) is not None:
                    _again(kernel, group, work, numbers, stream)
                else:
                    _first(group, work, numbers, do.distribution, stochastic, counters, here, table.tuning)

    return run


def _context(where: device, here: str) -> AbstractContextManager[object]:
    if here == "interpreter":
        import numpy

        return numpy.errstate(all="ignore")  # a GPU does not warn of infinities either
    return current(where)


def _first(
    group: Group,
    work: Work,
    numbers: Coefficients,
    distribution: str,
    stochastic: bool,
    counters: int,
    here: str,
    tuning: Tuning,
) -> None:
    """Launch by way of Triton's compiler, and keep the compiled kernel."""
    import triton.language as tl

    from .kernels import axpy_kernel

    constants = {
        "DISTRIBUTION": distribution,
        "DTYPE": getattr(tl, str(group.dtype).removeprefix("torch.")),
        "MASK": int(group.mask),
        "STOCHASTIC": stochastic,
        "DECAY": numbers.decay,
        "IN_PLACE": group.in_place,
        "ALIGNED": group.aligned,
        "COUNTERS": counters,
        "THREADS": _warp_size(here) * tuning.warps,
        "TARGET": here,
        "PREFETCH": tuning.prefetch,
    }
    kernel = axpy_kernel[(work.programs,)](
        group.rows,
        work.ids,
        work.first_chunk,
        work.active,
        group.blocks_per_chunk,
        numbers.seeds,
        numbers.scales,
        numbers.decays,
        numbers.directions,
        **constants,
        **options(tuning),
    )
    if here != "interpreter":
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        group.kernels[distribution, stochastic, numbers.decay] = kernel, tuple(constants.values())


def _again(compiled: tuple[Any, tuple[Any, ...]], group: Group, work: Work, numbers: Coefficients, stream: int) -> None:
    """Launch a compiled kernel directly: the types of its arguments have not changed, so Triton need not look again."""
    kernel, constants = compiled
    kernel[(work.programs, 1, 1)](
        group.address,
        *work.addresses,
        work.active,
        group.blocks_per_chunk,
        *numbers.addresses,
        numbers.directions,
        *constants,
        stream=stream,
    )


def _warp_size(here: str) -> int:
    if here == "interpreter":
        return 1
    from triton.runtime import driver

    return driver.active.get_current_target().warp_size


def _record(entry: Entry, block: int, here: str, tuning: Tuning) -> None:
    from .kernels import record_kernel

    assert entry.mask_tensor is not None
    numel = entry.dst.numel()
    record_kernel[(-(-numel // block),)](
        entry.src.detach(), entry.mask_tensor, entry.threshold, numel, BLOCK=block, TARGET=here, **options(tuning)
    )
