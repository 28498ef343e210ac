"""Calls the user's closure, and checks the losses that it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..trajectory.record import MAX_GRADIENT
from ..weights.rows import Value

Closure = Callable[[], "Tensor | float"]
Pair = tuple[Value, Value]  # (L+, L-) of one direction


class OutOfRange(ValueError):
    """A step is skipped because its numbers are not finite, or too large. With another batch the next may succeed."""


class Refused(Exception):
    """Ends a step that must be skipped. When the weights are restored, the user gets an exception of type `error`.

    Args:
        error: its type.
        message: why the step is skipped.
        of: comes before the message: which argument is wrong.
    """

    def __init__(self, error: type[Exception], message: str, of: str = "closure: "):
        super().__init__(message)
        self.error, self.of = error, of


def check_closure(name: str, closure: Any) -> Closure:
    """Return the closure; raise TypeError unless it can be called."""
    if callable(closure):
        return cast(Closure, closure)
    raise TypeError(
        f"{name}: expected a function that returns the loss, got {type(closure).__name__}; a step evaluates the loss "
        "itself, at perturbed weights and without backward(): opt.step(lambda: F.cross_entropy(model(inputs), labels))"
        + ("" if name == "closure" else f", and {name}= returns the loss on all of the data")
    )


def call(closure: Closure) -> Any:
    """Call a closure. Autocast caches casts of weights, which a move makes stale, so its cache is cleared."""
    torch.clear_autocast_cache()
    try:
        return closure()
    finally:
        torch.clear_autocast_cache()


def stays_on_device(loss: Tensor) -> bool:
    """Say whether a loss stays on its device. Reading its value would wait for all work that the device has queued."""
    return loss.device.type != "cpu"


def value_of(loss: Any) -> tuple[Tensor | float, Value]:
    """Return a copy of what the closure returned, and its value: a float, or a float64 scalar on its device.

    Raises:
        Refused: it is no finite scalar. Only the shape and dtype of a tensor on a GPU are checked.
    """
    if hasattr(loss, "full_tensor"):  # a DTensor, with tensor parallelism
        loss = loss.full_tensor()
    value = loss
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            shape = tuple(loss.shape)
            raise Refused(ValueError, f"expected a scalar loss, got a tensor of shape {shape}; take its mean")
        loss = loss.clone()  # a closure may write all its losses to one tensor
        if stays_on_device(loss):
            if loss.dtype == torch.bool or loss.is_complex():
                raise Refused(TypeError, f"expected a scalar loss, a tensor or a number, got a tensor of {loss.dtype}")
            return loss, loss.detach().reshape(()).to(torch.float64)
        value = loss.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = "; does it return the loss?" if value is None else ""
        raise Refused(TypeError, f"expected a scalar loss, a tensor or a number, got {type(value).__name__}{hint}")
    if not math.isfinite(value):
        raise Refused(OutOfRange, f"expected a finite loss, got {value}")
    return loss, float(value)


def check_pair(pair: Pair, span: float) -> None:
    """Raise Refused if g, their difference / span, is too large for float32. Losses on a device are not checked."""
    plus, minus = pair
    if isinstance(plus, Tensor) or isinstance(minus, Tensor):
        return
    if not abs(plus - minus) / span <= MAX_GRADIENT:
        raise Refused(OutOfRange, f"expected losses whose difference fits float32, got {plus} and {minus}")
