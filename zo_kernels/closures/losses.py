"""From what a closure returns to a projected gradient, and from that to an update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..trajectory.record import MAX_GRADIENT
from ..weights.rows import Value

Closure = Callable[[], "Tensor | float"]
Pair = tuple[Value, Value]  # (L+, L-) of a direction


class OutOfRange(ValueError):
    """A step is refused since its numbers are not finite, or too large; with another batch the next may be taken."""


class Refused(Exception):
    """No step can be made of the losses: an exception of `error` is to say why, after `of`, what they are of."""

    def __init__(self, error: type[Exception], message: str, of: str = "closure: "):
        super().__init__(message)
        self.error, self.of = error, of


def check_closure(name: str, closure: Any) -> Closure:
    """The closure; raise TypeError unless it can be called."""
    if callable(closure):
        return cast(Closure, closure)
    raise TypeError(
        f"{name}: expected a function that returns the loss, got {type(closure).__name__}; a step evaluates the loss "
        "itself, at perturbed weights and without backward(): opt.step(lambda: F.cross_entropy(model(inputs), labels))"
        + ("" if name == "closure" else f", and {name}=, the same of all of the data")
    )


def call(closure: Closure) -> Any:
    """What it returns. Should a step run within autocast, casts of weights that it caches must not outlive a move."""
    torch.clear_autocast_cache()
    try:
        return closure()
    finally:
        torch.clear_autocast_cache()


def stays_on_device(loss: Tensor) -> bool:
    """Whether its value is used where it is, unseen: reading it would wait for all that the device has yet to do."""
    return loss.device.type != "cpu"


def value_of(loss: Any) -> tuple[Tensor | float, Value]:
    """What the closure returned, safe from being overwritten, and as a number.

    Raises:
        Refused: it is no finite scalar. Of a tensor on a GPU only its shape and dtype are looked at.
    """
    if hasattr(loss, "full_tensor"):  # tensor parallel
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


def check_pair(pair: Pair, eps: float) -> None:
    """Raise Refused if g = (L+ - L-) / 2ε is too large for an update in float32, as far as that can be seen."""
    plus, minus = pair
    if isinstance(plus, Tensor) or isinstance(minus, Tensor):
        return
    if not abs(plus - minus) / (2 * eps) <= MAX_GRADIENT:
        raise Refused(OutOfRange, f"expected losses whose difference fits float32, got {plus} and {minus}")
