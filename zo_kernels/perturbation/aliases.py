"""Finds tensors that share memory with weights: code can read weights through them, past their parameters."""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_MOST_BETWEEN_LOOKS = 4096
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
# Aliases that optimizers have made: no closure reads weights through them.
_ours: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def references(storage: int) -> int:
    """How many tensors share a storage (`UntypedStorage._cdata`), plus a constant; 0 if PyTorch cannot tell."""
    return 0 if _use_count is None else int(_use_count(storage))


def storage_of(t: Tensor) -> int:
    """The storage of a tensor, for `references`; valid as long as the memory is."""
    return t.untyped_storage()._cdata


def extent(t: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if t.is_nested:  # it has no strides
        return t.untyped_storage().nbytes()
    return t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))


class Spans:
    """The address ranges of tensors that do not overlap."""

    def __init__(self, tensors: Sequence[Tensor]):
        every = [(t.data_ptr(), t.data_ptr() + t.nbytes, i) for i, t in enumerate(tensors)]
        self._spans = sorted(span for span in every if span[0] < span[1])
        self._starts = [start for start, _, _ in self._spans]

    def find(self, t: Tensor) -> int | None:
        """The index of the first tensor that overlaps t in memory, or None; t must have elements."""
        address = t.data_ptr()
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._spans[at][1]:
            return self._spans[at][2]
        after = at + 1
        if after < len(self._starts) and self._starts[after] < address + extent(t):
            return self._spans[after][2]
        return None


def _overlap(spans: Sequence[tuple[int, int]], t: Tensor) -> bool:
    """Whether the memory of a tensor overlaps one of the address ranges `spans`."""
    if t.layout != torch.strided or t.is_meta or not t.numel():
        return False
    first = t.data_ptr()
    end = first + extent(t)
    return any(first < stop and start < end for start, stop in spans)


class Aliases:
    """Tells whether any tensor, other than the weights and our own aliases, shares memory with a weight.

    As long as the reference counts of the weights' storages stay the same, the answer costs no more than to read them.

    Args:
        weights: the weights.
        own: our own alias of each weight.
    """

    def __init__(self, weights: Sequence[Tensor], own: Sequence[Tensor]):
        self._known = {id(t) for t in (*weights, *own)}
        _ours.update({id(t): t for t in own})
        self._spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in own if t.numel()]
        times = Counter(map(storage_of, own))
        self._storages = list(times)
        mine = nn.Parameter(torch.empty(1, device="cpu"))
        alias = mine.detach()
        one = references(storage_of(alias))
        self._without: list[int] | None = [one + 2 * (n - 1) for n in times.values()]  # the counts without aliases
        self._with: list[int] | None = None  # the counts with aliases
        self._asked, self._look_from, self._between = 0, 0, 16

    def exist(self) -> bool:
        """Whether there are, or may be, aliases."""
        if _use_count is None:
            return True
        counts = [*map(_use_count, self._storages)]
        if counts == self._without:
            return False
        self._asked += 1
        if counts == self._with or self._asked < self._look_from:
            return True
        self._look_from = self._asked + self._between
        self._between = min(2 * self._between, _MOST_BETWEEN_LOOKS)
        found = self._find()
        self._without, self._with = (self._without, counts) if found else (counts, self._with)
        return found

    def _find(self) -> bool:
        """Search all Python objects for an alias, which is slow."""
        with torch._C.DisableTorchFunctionSubclass():
            for t in gc.get_objects():
                if issubclass(type(t), Tensor) and id(t) not in self._known and id(t) not in _ours:
                    try:
                        if _overlap(self._spans, t):
                            return True
                    except RuntimeError:  # it has no memory
                        continue
        return False


@cache
def written(func: Any) -> tuple[tuple[int, str], ...]:
    """Which arguments of an operation it writes to: position and name."""
    schema = getattr(func, "_schema", None)  # operators of higher order have none
    if schema is None or not schema.is_mutable:
        return ()
    arguments = enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Of an argument of an operation."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []
