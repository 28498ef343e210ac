"""Tuning of the GPU kernels: options that change their speed, and no bit of their results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a table's launches divide the work. A table takes it when it is built.

    Args:
        most_blocks: blocks that one program takes at most, a power of two: they share the cost of reading the table. A
            program takes fewer if the table is so small that some processors would stay idle.
        warps: in a program of Triton. With 4, a thread has 16 elements of a block; one access moves 8 16-bit weights.
        prefetch: whether a program of Triton loads a block while it makes the noise of the one before. The CUDA C++
            kernel always does.
    """

    most_blocks: int = 16
    warps: int = 4
    prefetch: bool = False


DEFAULT = Tuning()
_current = [DEFAULT]


def current() -> Tuning:
    """The tuning for tables that are built now."""
    return _current[-1]


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """A context in which tables are built with another tuning, as benchmarks do."""
    _current.append(tuning)
    try:
        yield
    finally:
        _current.pop()
