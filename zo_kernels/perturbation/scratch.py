"""A buffer for perturbed copies of weights: taken when a module's forward begins, given back when it ends."""

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
    """A stack of bytes on one device. It grows to the most that was ever in use at once, and keeps that.

    An empty stack always hands out the same address. If a chunk in use is too small, a second chunk is added; both are
    replaced by one as soon as the stack is empty.

    Args:
        where: the device.
        inference: whether to make inference tensors; a parameter's data must be of the parameter's own kind.
        on_drop: called before a chunk is freed, so that holders of its tensors release them first.
    """

    def __init__(self, where: device, inference: bool, on_drop: Callable[[], None]):
        self._where, self._inference, self._on_drop = where, inference, on_drop
        self._chunks: list[Tensor] = []
        self._used: list[int] = []  # bytes of each chunk
        self._storages: list[int] = []  # see `storage_of`
        self._spans: list[tuple[int, int]] = []  # addresses of each chunk, the last exclusive
        self._most = 0  # the most bytes ever in use at once

    @property
    def chunks(self) -> list[Tensor]:
        """The memory: uint8 tensors."""
        return list(self._chunks)

    def take(self, size: int) -> tuple[int, int]:
        """Take `size` bytes, a multiple of ALIGNMENT, until `give_back`.

        Returns:
            Their place: the index of a chunk, and the offset in it.
        """
        if self._used == [0] and self._chunks[0].numel() >= self._most >= size:  # the common case
            self._used[0] = size
            return 0, 0
        self._most = max(self._most, sum(self._used) + size)
        at = self._chunk_with_room_for(size)
        start = self._used[at]
        self._used[at] += size
        return at, start

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes can be taken without growing beyond the most ever in use."""
        return sum(self._used) + size <= self._most

    def tensors(self, place: tuple[int, int], like: Sequence[Tensor]) -> list[Tensor]:
        """Make tensors as `carved` does, at a place that `take` returned."""
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
        # The chunk must be of its own kind whether or not the step runs in inference mode.
        with inference_mode(self._inference):
            chunk = torch.empty(size, dtype=torch.uint8, device=self._where)
        span = chunk.data_ptr(), chunk.data_ptr() + size
        kept: list[tuple[list[Any], Any]] = [(self._chunks, chunk), (self._used, 0)]
        kept += [(self._storages, storage_of(chunk)), (self._spans, span)]
        at_once([partial(each.append, new) for each, new in kept])

    def give_back(self, place: tuple[int, int]) -> None:
        """Free this place and all that was taken after it."""
        at, start = place
        self._used[at] = start
        for later in range(at + 1, len(self._used)):
            self._used[later] = 0

    def clear(self) -> None:
        """Free all that was taken; keep the memory."""
        self._used = [0] * len(self._used)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's memory lies in the buffer."""
        return lies_in(self._spans, t)

    def references(self, place: tuple[int, int]) -> int:
        """How many tensors share the chunk of a place, plus a constant."""
        return references(self._storages[place[0]])

    def is_free(self, address: int) -> bool:
        """Whether an address lies in a part of the buffer that is not taken."""
        found = find(self._chunks, address)
        return found is not None and found[1] >= self._used[found[0]]


def carved(memory: Tensor, like: Sequence[Tensor], inference: bool) -> list[Tensor]:
    """Make uninitialised tensors with the shapes, dtypes and strides of `like`, one after the other in `memory`.

    Strides matter: with others a module might run another kernel, which rounds differently.

    Args:
        memory: uint8, large enough (`bytes_for`).
        like: dense tensors; one with gaps gets a contiguous counterpart.
        inference: whether to make inference tensors.
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
    """Find the chunk that an address lies in: its index and the offset in it, or None."""
    for at, chunk in enumerate(chunks):
        start = address - chunk.data_ptr()
        if 0 <= start < chunk.numel():
            return at, start
    return None


def lies_in(spans: Sequence[tuple[int, int]], t: Tensor) -> bool:
    """Whether a tensor, or one that holds its elements, begins in one of the address ranges `spans`."""
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
    """Yield the tensors that hold the elements of one that is sparse, or wrapped by a transform such as torch.vmap."""
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
    """The bytes that copies of these tensors take in a buffer, padding included."""
    return sum(_aligned(t.numel() * t.element_size()) for t in tensors)


def without_aliases(output: Any, holds: Callable[[Tensor], bool]) -> Any:
    """Replace the tensors of a module's output that lie in a buffer by copies; None if none of them does.

    Args:
        holds: whether the buffer holds a tensor.
    """
    if isinstance(output, Tensor):
        return output.clone() if holds(output) else None
    if type(output) is tuple and all(isinstance(t, Tensor) and not holds(t) for t in output):
        return None  # the common case
    changed = False

    def copied(t: Tensor) -> Tensor:
        nonlocal changed
        if not holds(t):
            return t
        changed = True
        return t.clone()

    mapped = tree_map_only(Tensor, copied, output)
    return mapped if changed else None
