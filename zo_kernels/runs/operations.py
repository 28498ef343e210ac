"""Lists the PyTorch operations that a function calls, so that two functions can be compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OF_TORCH = str(Path(torch.__file__).parent)
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Operation(NamedTuple):
    """One operation.

    Attributes:
        name: with its overload, such as "aten::add.Tensor".
        given: its arguments: tensors as shape, strides, dtype and device, anything else as its value.
        at: the Python line outside PyTorch that called it.
    """

    name: str
    given: tuple[Any, ...]
    at: str

    def is_as(self, other: Operation | None) -> bool:
        """Say whether the device does the same thing for both."""
        return other is not None and self[:2] == other[:2]


class Operations(TorchDispatchMode):
    """Records every operation within the block, and changes nothing.

    Attributes:
        seen: the operations, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = f"{func._schema.name}.{func._schema.overload_name}".rstrip(".")
        self.seen.append(Operation(name, (_described(args), _described(kwargs)), _caller()))
        return func(*args, **kwargs)


def first_difference(
    left: Sequence[Operation], right: Sequence[Operation]
) -> tuple[Operation | None, Operation | None] | None:
    """Return the first pair of operations that differ; None if all are equal. None in a pair stands for an end."""
    pairs = zip_longest(left, right)
    return next(((a, b) for a, b in pairs if a is None or not a.is_as(b)), None)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            return str(value.layout), str(value.dtype), str(value.device)
        return tuple(value.shape), value.stride(), str(value.dtype), str(value.device)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((key, _described(item)) for key, item in value.items())
    # As text, since NaN does not equal itself. Other objects by their type, since their texts contain addresses.
    return repr(value) if value is None or isinstance(value, _PLAIN) else type(value).__name__


def _caller() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OF_TORCH, __file__)):
        frame = frame.f_back
    return f"{frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
