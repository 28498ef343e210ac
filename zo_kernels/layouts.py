"""How tensors lie in memory. Noise goes by logical index, as if a tensor were contiguous, whatever its strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Index = tuple[int | slice, ...]
ALIGNMENT = 64  # bytes where a tensor in shared memory begins: a cache line, and more than any kernel asks for


def is_dense(t: Tensor) -> bool:
    """Whether t's elements lie side by side, without gaps and none twice: some permutation of its dimensions is
    contiguous, as in channels_last or a transposed matrix.
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
    """What tells dense tensors' layouts apart: True for one that is contiguous, else its strides. Asked in every pass,
    of hundreds.
    """
    flags = [*map(Tensor.is_contiguous, tensors)]
    return flags if all(flags) else [flag or t.stride() for flag, t in zip(flags, tensors, strict=True)]


def in_memory_order(t: Tensor) -> Tensor:
    """A dense tensor's elements, one after the other as they lie: a view."""
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def stretches(shape: Sequence[int], most: int, multiple: int = 1) -> list[tuple[int, Index]]:
    """Cuts of a tensor's elements, in their logical order, into views of whole rows.

    Args:
        shape: of the tensor.
        most: elements of a view; it has more only if it cannot begin at a `multiple` otherwise.
        multiple: of which the index of each view's first element is one.

    Returns:
        For each view the logical index of its first element, and the index that makes it.
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
