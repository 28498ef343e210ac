"""Copies of numbers to a device, without waiting for it. `pending` is the way back."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, device


def signed(x: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    return x - 2**64 if x >= 2**63 else x


_FORMATS = {torch.int64: "q", torch.int32: "i", torch.float32: "d", torch.float64: "d"}
_MOST_KEPT = 256
_kept: OrderedDict[tuple[device, torch.dtype, bytes], tuple[Tensor, Callable[[], None]]] = OrderedDict()
_captured: list[Tensor] = []


def on_device(values: Sequence[int] | Sequence[float], dtype: torch.dtype, where: device) -> Tensor:
    """A tensor of the values, which the current stream may read. Nobody may write to it.

    Nobody waits for the copy. Recent copies are kept and shared: the passes of a step, and of a module's forwards, have
    the same numbers.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the values were not copied before.
    """
    if where.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=where)
    # Floats by their bits, since 0.0 and -0.0 are equal.
    key = (where, dtype, struct.pack(f"<{len(values)}{_FORMATS[dtype]}", *values))
    capturing = torch.cuda.is_current_stream_capturing()
    if key in _kept:
        _kept.move_to_end(key)
        tensor, make_ready = _kept[key]
        if capturing:  # a capture begins by waiting for all streams
            _captured.append(tensor)  # the graph reads it for as long as it lives
        else:
            make_ready()
        return tensor
    if capturing:
        raise RuntimeError("CUDA graph: expected numbers that an earlier pass had; run the step once before capturing")
    stream = torch.cuda.current_stream(where)
    # PyTorch does not reuse the pinned copy before the device has read it.
    tensor = torch.tensor(values, dtype=dtype, device="cpu").pin_memory().to(where, non_blocking=True)
    event = stream.record_event()

    def ready() -> None:
        current = torch.cuda.current_stream(where)
        if current != stream:
            current.wait_event(event)
            tensor.record_stream(current)

    _kept[key] = tensor, ready
    if len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return tensor
