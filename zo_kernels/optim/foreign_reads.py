"""Finding weights that are read where their module does not run, by watching every operation of an evaluation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that take a tensor for its shape and type alone; views are told by their schema.
_SHAPE_ONLY = {
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::new_full",
    "aten::new_ones",
    "aten::new_zeros",
    "aten::empty_like",
    "aten::full_like",
    "aten::ones_like",
    "aten::rand_like",
    "aten::randn_like",
    "aten::zeros_like",
    "aten::_has_compatible_shallow_copy_type",
    "aten::is_same_size",
}


class Watch(TorchDispatchMode):
    """Calls `on_read(i)` whenever an operation reads memory of the i-th tensor.

    Args:
        tensors: none overlapping.
        on_read: may be called many times for one read.
    """

    def __init__(self, tensors: Sequence[Tensor], on_read: Any):
        super().__init__()
        spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i) for i, t in enumerate(tensors)]
        self._spans = sorted(span for span in spans if span[0] < span[1])
        self._starts = [start for start, _, _ in self._spans]
        self._on_read = on_read
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For our own reads."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused and func._schema.name not in _SHAPE_ONLY:
            for t in _tensors((args, kwargs)):
                self._look(t, result, func.is_view)
        return result

    def _look(self, t: Tensor, result: Any, may_be_view: bool) -> None:
        if t.layout != torch.strided or t.is_meta or not t.numel():
            return
        address = t.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._spans[at][1]:
            return
        # What a schema calls a view may be a copy: `to` and `reshape` decide when they run.
        storage = t.untyped_storage().data_ptr()
        if may_be_view and all(r.untyped_storage().data_ptr() == storage for r in _tensors(result)):
            return
        self._on_read(self._spans[at][2])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
