"""The primitive in C++ for CPUs (csrc/cpu/): a pass is one call, for any number of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import device

from ..spec import DISTRIBUTIONS
from .fits import Fits, rows_of
from .staged import is_staged
from .types import Entry, InC, Pass

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/axpy.h: DType

_native: Any
try:
    from .. import _native  # type: ignore[attr-defined, no-redef]
except ImportError as error:  # reported at the first use: the package also works without it
    _native = None
    _missing = f"the native extension is not built ({error}); reinstall zo_kernels with a C++17 compiler at hand"


def instruction_sets() -> list[str]:
    """The instruction sets that this processor has, the fastest first."""
    return _native.instruction_sets() if _native else []


class Native:
    """The native backend, with a given instruction set or with the fastest that the processor has."""

    takes_any_layout = True

    def __init__(self, instruction_set: str | None = None):
        self.instruction_set = instruction_set

    def unavailable(self, where: device) -> str | None:
        if _native is None:
            return _missing
        if where.type != "cpu":
            return f"it works on CPU tensors, got {where}"
        if self.instruction_set not in (None, *instruction_sets()):
            return f"this processor has no {self.instruction_set}, only {', '.join(instruction_sets())}"
        return None

    def prepare(self, entries: Sequence[Entry]) -> Callable[[Pass], None]:
        Fits(entries, any_layout=True)
        chosen = self.instruction_set or instruction_sets()[0]
        table = _native.Table(
            [
                (
                    e.dst.data_ptr(),
                    e.src.data_ptr(),
                    e.dst.numel(),
                    e.offset,
                    e.param_id,
                    e.group,
                    _DTYPES[e.dst.dtype],
                    int(e.mask),
                    e.threshold,
                    0 if e.mask_tensor is None else e.mask_tensor.data_ptr(),
                    e.dst.nbytes,
                    e.src.nbytes,
                    0 if e.mask_tensor is None else e.mask_tensor.nbytes,
                )
                for e in entries
            ],
            *_layouts(entries),
        )
        return _Run(table, chosen, entries)


Strided = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _layouts(entries: Sequence[Entry]) -> list[dict[int, Strided]]:
    """Index -> (shape, strides of dst, strides of src) of the entries that are not contiguous; [] if all are."""
    found: dict[int, Strided] = {
        i: (e.dst.shape, e.dst.stride(), e.src.stride()) for i, e in enumerate(entries) if is_staged(e)
    }
    return [found] if found else []


class _Run(InC):
    def __init__(self, table: Any, instruction_set: str, entries: Sequence[Entry]):
        self._table, self._instruction_set = table, instruction_set
        self._kept = entries  # keeps the tensors alive: the table has only their addresses

    def bound(self, do: Pass) -> Callable[[], object]:
        numbers, threads = do.once("native", _numbers), torch.get_num_threads()
        return partial(self._table.run, *numbers, do.stochastic, do.active, threads, self._instruction_set)


def _numbers(do: Pass) -> tuple[list[int], list[float], list[float], int]:
    """Seeds, scales (groups * directions), decays (groups) and the number of the distribution."""
    if do.distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected {' or '.join(DISTRIBUTIONS)}, got {do.distribution!r}")
    given, do, n = do, do.on_host(), len(do.seeds)
    try:
        even = len(do.scales) == len(do.decays) and all(len(row) == n for row in do.scales)
    except TypeError:
        even = False
    if do is not given or not even:  # the rest is checked in C++
        rows_of(given)
    return do.host_seeds, [s for row in do.scales for s in row], list(do.decays), DISTRIBUTIONS.index(do.distribution)
