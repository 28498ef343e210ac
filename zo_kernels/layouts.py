"""How tensors lie in memory. An element's noise depends on its logical index alone, never on strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Index = tuple[int | slice, ...]
ALIGNMENT = 64  # bytes where a tensor in shared memory begins: a cache line, and more than any kernel asks for


def is_dense(t: Tensor) -> bool:
    """Whether t's elements fill their memory without gaps or repeats: some permutation of its dimensions is contiguous,
    as in channels_last or a transposed matrix.
    """
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def layouts(tensors: Sequence[Tensor]) -> Sequence[object]:
    """A value for each dense tensor that tells its layout: True if it is contiguous, else its strides.

    This runs in every pass over hundreds of tensors, so it must be fast.
    """
    flags = [*map(Tensor.is_contiguous, tensors)]
    return flags if all(flags) else [flag or t.stride() for flag, t in zip(flags, tensors, strict=True)]


def in_memory_order(t: Tensor) -> Tensor:
    """A one-dimensional view of a dense tensor's elements in the order of their addresses."""
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def stretches(shape: Sequence[int], most: int, multiple: int = 1) -> list[tuple[int, Index]]:
    """Cut a tensor, in logical order, into views of whole rows.

    Args:
        shape: of the tensor.
        most: elements of a view at most; more only where the next view could not begin at a `multiple` otherwise.
        multiple: the logical index of each view's first element is a multiple of this.

    Returns:
        For each view the logical index of its first element, and the index expression that selects it.
    """
    n = math.prod(shape)
    if n <= most:
        return [(0, ())]
    row = n // shape[0]
    if row > most and row % multiple == 0:
        inner = stretches(shape[1:], most, multiple)
        return [(i * row + at, (i, *index)) for i in range(shape[0]) for at, index in inner]
    step = multiple // math.gcd(row, multiple)
    rows = max(most // row // step, 1) * step
    return [(i * row, (slice(i, i + rows),)) for i in range(0, shape[0], rows)]
