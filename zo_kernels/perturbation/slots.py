"""Memory on a device for the weights of the modules that run, and of the next one, which is on its way there."""

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
    filled: torch.cuda.Event | None = None  # when what was copied there has arrived
    read: torch.cuda.Event | None = None  # when nobody reads what was there any more
    references: int = 0  # to it before it was filled


class Slots:
    """Equal pieces of memory, each large enough for any module's weights. Modules that run within each other have one
    each, and the next module another.

    On a GPU copies are made by a stream of their own, beside the work on the current one; they overlap with it if the
    memory that they come from is pinned.

    Args:
        where: the device.
        inference: whether to make inference tensors.
        on_drop: called before memory is dropped, so that whoever kept what was taken from it lets go of it first.

    Attributes:
        bytes_copied: to the device, so far.
    """

    def __init__(self, where: device, inference: bool, on_drop: Callable[[], None]):
        self._where, self._inference, self._on_drop = where, inference, on_drop
        self._slots: list[_Slot] = []
        self._size = 0
        self._copying = torch.cuda.Stream(where) if where.type == "cuda" else None
        if self._copying is not None:
            # What is copied may be given up along with us, and PyTorch does not know of each piece of pinned memory who
            # still reads it: it would hand it out again at once.
            weakref.finalize(self, self._copying.synchronize).atexit = False
        self.bytes_copied = 0

    @property
    def chunks(self) -> list[Tensor]:
        """The memory itself."""
        return [slot.memory for slot in self._slots]

    def reserve(self, size: int) -> None:
        """Make all slots large enough for so many bytes. None may be taken."""
        if size > self._size:
            self._on_drop()
            self._slots.clear()
            self._size = size

    def fill(self, sources: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """Copy tensors into a slot that is free, or a new one, without waiting for it.

        Returns:
            The slot's number, which is the caller's until `give_back`, and the copies, to be read after `arrived`.
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
            if slot.read is None:  # new memory: it may be what the current stream has given up
                slot.read = torch.cuda.current_stream(self._where).record_event()
            self._copying.wait_event(slot.read)
            with torch.cuda.stream(self._copying):
                for copy, source in zip(copies, sources, strict=True):
                    copy.copy_(source, non_blocking=True)
                slot.filled = self._copying.record_event()
        self.bytes_copied += sum(t.numel() * t.element_size() for t in sources)
        return number, copies

    def references(self, number: int) -> int:
        """How many tensors have a slot's memory, and some constant."""
        return references(storage_of(self._slots[number].memory))

    def references_before(self, number: int) -> int:
        """... when it was not filled yet."""
        return self._slots[number].references

    def arrived(self, number: int) -> None:
        """Let the current stream wait for what was copied into a slot."""
        if (event := self._slots[number].filled) is not None:
            torch.cuda.current_stream(self._where).wait_event(event)

    def give_back(self, number: int) -> None:
        """The work that the current stream has been given by now is the last to use the slot."""
        slot = self._slots[number]
        slot.taken = False
        if self._copying is not None:
            slot.read = torch.cuda.current_stream(self._where).record_event()

    def discard(self, number: int) -> None:
        """Give back a slot that nobody has waited for."""
        self.arrived(number)
        self.give_back(number)

    def clear(self) -> None:
        """Give back all."""
        for number, slot in enumerate(self._slots):
            if slot.taken:
                self.discard(number)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's memory lies in a slot."""
        return any(find(self.chunks, part.data_ptr()) is not None for part in parts_of(t))

    def is_free(self, address: int) -> bool:
        """Whether an address is of memory in a slot that nobody has taken."""
        found = find(self.chunks, address)
        return found is not None and not self._slots[found[0]].taken
