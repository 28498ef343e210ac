"""From what a closure returns to a projected gradient, and from that to an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], "Tensor | float"]

_MAX_GRADIENT = 1e30  # times any learning rate in use it is finite in float32


class Refused(Exception):
    """A step cannot be made of what the closure returned: an exception of `error` is to say why."""

    def __init__(self, error: type[Exception], message: str):
        super().__init__(message)
        self.error = error


def check_closure(name: str, closure: Any) -> None:
    """Raise TypeError unless it can be called."""
    if not callable(closure):
        raise TypeError(f"{name}: expected a function that returns the loss, got {type(closure).__name__}")


def call(closure: Closure) -> Any:
    """What it returns. Should a step run within autocast, casts of weights that it caches must not outlive a move."""
    torch.clear_autocast_cache()
    try:
        return closure()
    finally:
        torch.clear_autocast_cache()


def value_of(loss: Any) -> tuple[Tensor | float, float]:
    """What the closure returned, safe from being overwritten, and as a number.

    Raises:
        Refused: it is no finite scalar.
    """
    value = loss
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise Refused(ValueError, f"expected a scalar loss, got a tensor of shape {tuple(loss.shape)}")
        loss, value = loss.clone(), loss.item()  # a closure may write all its losses to one tensor
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(TypeError, f"expected a scalar loss, a tensor or a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise Refused(ValueError, f"expected a finite loss, got {value}")
    return loss, float(value)


def check_pair(pair: tuple[float, float], eps: float) -> None:
    """Raise Refused if g = (L+ - L-) / 2ε is too large for an update in float32."""
    if not abs(pair[0] - pair[1]) / (2 * eps) <= _MAX_GRADIENT:
        raise Refused(ValueError, f"expected losses whose difference fits float32, got {pair[0]} and {pair[1]}")


def spsa_update(seeds: Sequence[int], gradients: Sequence[float], rates: Sequence[float]) -> dict[int, list[float]]:
    """seed -> -lr * g / n for each row."""
    n = len(seeds)
    return {s: [-lr * g / n for lr in rates] for s, g in zip(seeds, gradients, strict=True)}


def decay_factors(rates: Sequence[float], weight_decays: Sequence[float]) -> list[float]:
    """The factor of the old weights for each row: 1 - lr * weight_decay."""
    return [1.0 - lr * w for lr, w in zip(rates, weight_decays, strict=True)]
