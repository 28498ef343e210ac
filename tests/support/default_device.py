"""What it makes a difference to that tensors have another device by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def with_and_without(make: Callable[[], T]) -> tuple[T, T]:
    """What it makes where a tensor whose device is not said is on "meta", without memory, and what it makes else."""
    torch.set_default_device("meta")
    try:
        changed = make()
    finally:
        torch.set_default_device(None)
    return changed, make()  # in this order, lest it remembers what it made before
