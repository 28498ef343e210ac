"""Device memory for streamed weights: slots for the modules that run, and one for the next module's weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, device

from ..modes import inference_mode
from .aliases import references, storage_of
from .scratch import carved, find, parts_of


@dataclass(slots=True)
class _Slot:
    memory: Tensor
    taken: bool = False
    filled: torch.cuda.Event | None = None  # the copies into it have arrived
    read: torch.cuda.Event | None = None  # the last reader of its former contents has finished
    references: int = 0  # to its memory, before it was filled


class Slots:
    """Pieces of memory of equal size, each large enough for any module's weights.

    Each running module has a slot, also modules that run within each other; one more is for the module that comes next.
    On a GPU, copies run in a stream of their own, and overlap with the work on the current stream if their source is
    pinned.

    Args:
        where: the device.
        inference: whether to make inference tensors.
        on_drop: called before memory is freed, so that holders of its tensors release them first.

    Attributes:
        bytes_copied: bytes copied to the device so far.
    """

    def __init__(self, where: device, inference: bool, on_drop: Callable[[], None]):
        self._where, self._inference, self._on_drop = where, inference, on_drop
        self._slots: list[_Slot] = []
        self._size = 0
        self._copying = torch.cuda.Stream(where) if where.type == "cuda" else None
        if self._copying is not None:
            # The sources may be freed together with this object, and PyTorch does not always know that a copy still
            # reads a piece of pinned memory: it would hand the memory out again at once.
            weakref.finalize(self, self._copying.synchronize).atexit = False
        self.bytes_copied = 0

    @property
    def chunks(self) -> list[Tensor]:
        """The memory: a uint8 tensor for each slot."""
        return [slot.memory for slot in self._slots]

    def reserve(self, size: int) -> None:
        """Make every slot at least `size` bytes large; no slot may be taken."""
        if size > self._size:
            self._on_drop()
            self._slots.clear()
            self._size = size

    def fill(self, sources: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """Start to copy tensors into a free slot, or a new one; take the slot until `give_back`.

        Returns:
            The slot's number, and the copies, which may be read after `arrived`.
        """
        number = next((i for i, slot in enumerate(self._slots) if not slot.taken), len(self._slots))
        if number == len(self._slots):
            with inference_mode(self._inference):
                self._slots.append(_Slot(torch.empty(self._size, dtype=torch.uint8, device=self._where)))
        slot = self._slots[number]
        slot.taken = True
        slot.references = self.references(number)
        copies = carved(slot.memory, sources, self._inference)
        if self._copying is None:
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source)
        else:
            if slot.read is None:  # new memory, which the current stream may still be using
                slot.read = torch.cuda.current_stream(self._where).record_event()
            self._copying.wait_event(slot.read)
            with torch.cuda.stream(self._copying):
                for copy, source in zip(copies, sources, strict=True):
                    copy.copy_(source, non_blocking=True)
                slot.filled = self._copying.record_event()
        self.bytes_copied += sum(t.numel() * t.element_size() for t in sources)
        return number, copies

    def references(self, number: int) -> int:
        """How many tensors share a slot's memory, plus a constant."""
        return references(storage_of(self._slots[number].memory))

    def references_before(self, number: int) -> int:
        """What `references` returned just before the slot was filled."""
        return self._slots[number].references

    def arrived(self, number: int) -> None:
        """Make the current stream wait for the copies into a slot."""
        if (event := self._slots[number].filled) is not None:
            torch.cuda.current_stream(self._where).wait_event(event)

    def give_back(self, number: int) -> None:
        """Free a slot; work already queued on the current stream may still read it."""
        slot = self._slots[number]
        slot.taken = False
        if self._copying is not None:
            slot.read = torch.cuda.current_stream(self._where).record_event()

    def discard(self, number: int) -> None:
        """Free a slot whose copies nobody has waited for."""
        self.arrived(number)
        self.give_back(number)

    def clear(self) -> None:
        """Free all slots."""
        for number, slot in enumerate(self._slots):
            if slot.taken:
                self.discard(number)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's memory lies in a slot."""
        return any(find(self.chunks, part.data_ptr()) is not None for part in parts_of(t))

    def is_free(self, address: int) -> bool:
        """Whether an address lies in a slot that is not taken."""
        found = find(self.chunks, address)
        return found is not None and not self._slots[found[0]].taken
