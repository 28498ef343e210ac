"""One buffer for weights that are needed for the time of a module's forward: taken and given back like a stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, device
from torch.utils._pytree import tree_map_only

from ..interrupts import at_once
from ..layouts import ALIGNMENT, is_dense
from ..modes import inference_mode
from .aliases import references, storage_of


class Scratch:
    """A stack of bytes on one device. It grows to the most that was ever taken at once, and keeps that.

    What is taken while nothing else is comes from one chunk, always at the same place. Should a chunk be too small
    while it is in use, another is put on top of it, until both can be replaced by one.

    Args:
        where: the device.
        inference: whether to make inference tensors; neither kind can stand in for the other in a parameter.
        on_drop: called before a chunk is dropped, so that whoever kept what was taken from it lets go of it first.
    """

    def __init__(self, where: device, inference: bool, on_drop: Callable[[], None]):
        self._where, self._inference, self._on_drop = where, inference, on_drop
        self._chunks: list[Tensor] = []
        self._used: list[int] = []  # bytes of each chunk
        self._storages: list[int] = []  # see `storage_of`
        self._spans: list[tuple[int, int]] = []  # addresses of each chunk, the last exclusive
        self._most = 0  # bytes ever in use

    @property
    def chunks(self) -> list[Tensor]:
        """The memory itself."""
        return list(self._chunks)

    def take(self, size: int) -> tuple[int, int]:
        """Take so many bytes.

        Args:
            size: a multiple of ALIGNMENT.

        Returns:
            The chunk they are in, and the first of them. They are the taker's until `give_back`.
        """
        if self._used == [0] and self._chunks[0].numel() >= self._most >= size:  # as for most modules
            self._used[0] = size
            return 0, 0
        self._most = max(self._most, sum(self._used) + size)
        at = self._chunk_with_room_for(size)
        start = self._used[at]
        self._used[at] += size
        return at, start

    def fits(self, size: int) -> bool:
        """Whether so many bytes more would be no more than was ever in use."""
        return sum(self._used) + size <= self._most

    def tensors(self, place: tuple[int, int], like: Sequence[Tensor]) -> list[Tensor]:
        """As `carved`, in memory that `take` returned for them."""
        at, start = place
        return carved(self._chunks[at][start:], like, self._inference)

    def _chunk_with_room_for(self, size: int) -> int:
        in_use = [at for at, used in enumerate(self._used) if used]
        at = in_use[-1] if in_use else 0
        if not in_use and (len(self._chunks) != 1 or self._chunks[0].numel() < self._most):
            self._drop_from(0)
            self._add(self._most)
        elif self._chunks[at].numel() - self._used[at] < size:
            self._drop_from(at + 1)
            self._add(size)
            at += 1
        return at

    def _drop_from(self, at: int) -> None:
        if at == len(self._chunks):
            return
        self._on_drop()
        kept = self._chunks, self._used, self._storages, self._spans
        at_once([partial(each.__delitem__, slice(at, None)) for each in kept])

    def _add(self, size: int) -> None:
        # Whether the step runs in inference mode or not.
        with inference_mode(self._inference):
            chunk = torch.empty(size, dtype=torch.uint8, device=self._where)
        span = chunk.data_ptr(), chunk.data_ptr() + size
        kept: list[tuple[list[Any], Any]] = [(self._chunks, chunk), (self._used, 0)]
        kept += [(self._storages, storage_of(chunk)), (self._spans, span)]
        at_once([partial(each.append, new) for each, new in kept])

    def give_back(self, place: tuple[int, int]) -> None:
        """Free what was taken from there on."""
        at, start = place
        self._used[at] = start
        for later in range(at + 1, len(self._used)):
            self._used[later] = 0

    def clear(self) -> None:
        """Free all that was taken; the memory is kept."""
        self._used = [0] * len(self._used)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's memory lies in the buffer."""
        return lies_in(self._spans, t)

    def references(self, place: tuple[int, int]) -> int:
        """How many tensors have the memory that a place is in, and some constant."""
        return references(self._storages[place[0]])

    def is_free(self, address: int) -> bool:
        """Whether an address is of memory in the buffer that nobody has taken."""
        found = find(self._chunks, address)
        return found is not None and found[1] >= self._used[found[0]]


def carved(memory: Tensor, like: Sequence[Tensor], inference: bool) -> list[Tensor]:
    """A tensor of each of these shapes, dtypes and dense layouts, uninitialised, one after the other from the memory's
    begin on. With other strides a module might run another kernel, which rounds in another way.
    """
    made, start = [], 0
    with inference_mode(inference):
        for t in like:
            nbytes = t.numel() * t.element_size()
            flat = memory[start : start + nbytes].view(t.dtype)
            made.append(flat.as_strided(t.shape, t.stride()) if is_dense(t) else flat.view(t.shape))
            start += _aligned(nbytes)
    return made


def find(chunks: Sequence[Tensor], address: int) -> tuple[int, int] | None:
    """Which of the chunks an address lies in, and how many bytes from its begin; None if it lies in none."""
    for at, chunk in enumerate(chunks):
        start = address - chunk.data_ptr()
        if 0 <= start < chunk.numel():
            return at, start
    return None


def lies_in(spans: Sequence[tuple[int, int]], t: Tensor) -> bool:
    """Whether a tensor's memory, or a part of what holds its elements, begins in one of the spans of addresses."""
    parts: tuple[Tensor, ...] = (t,)
    if t.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(t):
        parts = tuple(parts_of(t))
    for part in parts:
        address = part.data_ptr()
        for first, end in spans:
            if first <= address < end:
                return True
    return False


def parts_of(t: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the elements of one that is sparse, or wrapped by a transform such as `torch.vmap`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    if t.layout == torch.sparse_coo:
        yield t._values()
    elif t.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        yield t.values()
    elif t.layout == torch.strided:
        yield t


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def bytes_for(tensors: Sequence[Tensor]) -> int:
    """What `Scratch.take` must be asked for, for copies of these tensors."""
    return sum(_aligned(t.numel() * t.element_size()) for t in tensors)


def without_aliases(output: Any, holds: Callable[[Tensor], bool]) -> Any:
    """A module's output with copies of the tensors that a buffer holds, or None if it holds none."""
    if isinstance(output, Tensor):
        return output.clone() if holds(output) else None
    if type(output) is tuple and all(isinstance(t, Tensor) and not holds(t) for t in output):
        return None  # as for most modules
    changed = False

    def copied(t: Tensor) -> Tensor:
        nonlocal changed
        if not holds(t):
            return t
        changed = True
        return t.clone()

    mapped = tree_map_only(Tensor, copied, output)
    return mapped if changed else None
