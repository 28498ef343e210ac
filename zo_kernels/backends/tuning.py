"""What makes the GPU kernels faster or slower and changes no bit of what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a table's launches divide the work. A table takes it when it is built.

    Args:
        most_blocks: that one program takes, a power of two, so that what it reads of the table is spread over them. It
            takes fewer if the table is so small that some processors would get nothing to do.
        warps: of a program of Triton's; with 4, a thread has 16 elements of a block. Of 16-bit weights it needs 8, one
            access.
        prefetch: whether Triton's program loads a block while it makes the noise of the one before. CUDA C++ always
            does.
    """

    most_blocks: int = 16
    warps: int = 4
    prefetch: bool = False


DEFAULT = Tuning()
_current = [DEFAULT]


def current() -> Tuning:
    """For tables that are built now."""
    return _current[-1]


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Build tables within with another tuning, as benchmarks do."""
    _current.append(tuning)
    try:
        yield
    finally:
        _current.pop()
