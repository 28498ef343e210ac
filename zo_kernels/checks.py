"""Checks of user input. Each raises a TypeError or ValueError with the parameter, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .layouts import is_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SEED = 2**64 - 1
MAX_PARAM_ID = 2**32 - 1
MAX_INDEX = 2**63 - 1
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127  # larger numbers are infinite in the kernels, which compute in float32
MIN_FLOAT32 = 2.0**-126


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int; it must be in [low, high]."""
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer {bounds}, got {type(value).__name__} {value!r}")
    value = int(value)
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")
    return value


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low=False, open_high=False
) -> float:
    """The value as a float; it must be finite and in [low, high], ends excluded where open."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    left, right = "(" if open_low or low == -math.inf else "[", ")" if open_high or high == math.inf else "]"
    wanted = f"expected a finite number in {left}{low}, {high}{right}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {wanted}, got {type(value).__name__} {value!r}")
    try:
        value = float(value)
    except OverflowError:  # an integer too large for a float
        value = math.inf if value > 0 else -math.inf
    inside = math.isfinite(value) and low <= value <= high
    if not inside or (open_low and value == low) or (open_high and value == high):
        raise ValueError(f"{name}: {wanted}, got {value}")
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """The value, which must be one of the allowed strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def sequence(name: str, value: Any, length: int | None = None) -> list[Any]:
    """The value as a list; it must be a sequence, of the given length if there is one."""
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name}: expected {length} entries, got {len(value)}")
    return list(value)


def weight(name: str, t: Any) -> None:
    """Check that t is a tensor that a kernel can change in place: dense, of a supported dtype, with data."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if hasattr(t, "to_local"):
        raise TypeError(f"{name}: expected a plain tensor, got {type(t).__name__}; pass its local shard and its offset")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {t.layout}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {str(t.dtype).removeprefix('torch.')}")
    if t.is_meta:
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    if not is_dense(t):
        raise ValueError(
            f"{name}: expected a tensor without gaps or repeats in memory, contiguous or of another order such as "
            f"channels_last, got strides {t.stride()} for shape {tuple(t.shape)}; use a clone()"
        )


def one_device(names: Sequence[str], tensors: Sequence[Tensor]) -> torch.device:
    """The device of the tensors, which must be the same for all."""
    first = tensors[0].device
    for name, t in zip(names, tensors, strict=True):
        if t.device != first:
            raise ValueError(f"{name}: expected device {first}, as {names[0]}, got {t.device}")
    return first


def mask(name: str, value: Any, t: Tensor) -> float | Tensor | None:
    """A mask of t: None, a threshold, or a contiguous bool tensor of t's shape on its device (a copy if need be)."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected None, a threshold or a bool tensor, got {type(value).__name__}")
        if math.isnan(value):
            raise ValueError(f"{name}: expected a threshold that is a number, got nan")
        return float(value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {str(value.dtype).removeprefix('torch.')}")
    if value.shape != t.shape:
        raise ValueError(f"{name}: expected the tensor's shape {tuple(t.shape)}, got {tuple(value.shape)}")
    if value.device != t.device:
        raise ValueError(f"{name}: expected the tensor's device {t.device}, got {value.device}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense mask (torch.strided), got {value.layout}")
    return value.contiguous()


def usable_device(name: str, where: Any) -> torch.device:
    """The device, with its index; tensors must be usable on it.

    Raises:
        ValueError: PyTorch cannot use it here, or it has no memory.
    """
    try:
        found = torch.empty(0, device=where).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]  # some messages go on to list every operation
        raise ValueError(f"{name}: expected a device that PyTorch can use here, got {where!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError(f"{name}: expected a device with memory, got {where!r}")
    return found


def mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """value, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a dictionary, got {type(value).__name__}")
    return value


def boolean(name: str, value: Any) -> bool:
    """value, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {value!r}")
    return value
