"""The primitive in CUDA C++ (csrc/cuda/): one launch for all tensors of one dtype, kind of mask and alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import device

from ..spec import DISTRIBUTIONS
from .fits import Fits
from .gpu_table import Coefficients, GpuTable, current, stream_of
from .types import Entry, Pass

OLDEST = (8, 0)  # compute capability; setup.py compiles for it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/axpy.h: DType

_cuda: Any
try:
    from .. import _cuda  # type: ignore[attr-defined, no-redef]
except ImportError as error:  # reported at the first use: the package also works without it
    _cuda = None
    _missing = (
        f"the CUDA extension is not built ({error}); reinstall zo_kernels with ZO_KERNELS_CUDA=1 and nvcc at hand"
    )


def unavailable(where: device) -> str | None:
    """Why it cannot run on that device here, or None if it can."""
    if where.type != "cuda":
        return f"it works on CUDA tensors, got one on {where.type}"
    if _cuda is None:
        return _missing
    if torch.version.hip:
        return "this PyTorch is built for ROCm, not for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if error := _cuda.device_error():  # the extension has its own runtime, which may be too new for the driver
        return f"the CUDA extension's runtime says: {error}"
    if (capability := torch.cuda.get_device_capability(where)) < OLDEST:
        return f"it needs a GPU of compute capability {_dotted(OLDEST)} or later, {where} has {_dotted(capability)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def prepare(entries: Sequence[Entry]) -> Callable[[Pass], None]:
    """Build a table once and return the function that launches a pass over it on the current stream.

    A pass changes dst of the active entries, and mask_tensor of those that record.
    """
    if not entries:
        return lambda do: None
    fits, table, where = Fits(entries), GpuTable(entries), entries[0].dst.device

    def run(do: Pass) -> None:
        fits.check(do)
        with current(where):
            stream = stream_of(where)
            numbers = Coefficients.of(do, where, stream)
            for entry in table.recorded_apart(do):
                _record(entry, stream)
            for group, work in table.launches(do):
                _cuda.axpy(
                    DISTRIBUTIONS.index(do.distribution),
                    _DTYPES[group.dtype],
                    group.mask,
                    do.stochastic,
                    numbers.decay,
                    group.address,
                    *work.addresses,
                    work.active,
                    work.programs,
                    group.blocks_per_chunk,
                    *numbers.addresses,
                    numbers.directions,
                    stream,
                )

    return run


def _record(entry: Entry, stream: int) -> None:
    assert entry.mask_tensor is not None
    dtype, n = _DTYPES[entry.src.dtype], entry.src.numel()
    _cuda.record(dtype, entry.src.data_ptr(), entry.mask_tensor.data_ptr(), entry.threshold, n, stream)
