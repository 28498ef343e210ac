"""Read the training examples so that a resumed run reads the same batches as a run that was not cut off.

Datasets, samplers and collators draw random numbers from a stream of the epoch, which nothing else, such as an
evaluation, can move. A run that is resumed within an epoch begins the epoch again and reads the batches before its
place once more. If no random numbers were drawn, it skips these batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import IterableDataset

from zo_kernels.integrations.transformers.draws import Draws, own_generators, set_own_generators
from zo_kernels.spec import direction_seed

_SLOT = 2**19 + 1  # of `direction_seed`: neither a direction nor an anchor has this number
_COMPARED = 1024  # elements of each tensor of a batch
_SAMPLER = "batch_sampler"


class Reading:
    """An iterator over the batches of one epoch."""

    def __init__(self, loader: Any, seed: int, epoch: int):
        self.epoch, self.batches = epoch, 0
        self._loader = self._whole = loader
        self._draws = Draws(direction_seed(seed, epoch, _SLOT) >> 1)
        self._began = own_generators(self.roots())
        self._iterator: Iterator[Any] | None = None
        self._ahead: list[Any] = []
        self._last: list[Tensor] = []
        self._ended = False

    def roots(self) -> dict[str, Any]:
        """The objects that may have generators of their own."""
        return {name: getattr(self._whole, name, None) for name in ("collate_fn", "dataset", _SAMPLER)}

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Any:
        batch = self._ahead.pop() if self._ahead else self._read()
        self.batches += 1
        self._last = [t.flatten()[:_COMPARED].clone() for t in _tensors(batch)]
        return batch

    def _read(self) -> Any:
        if self._ended:
            raise StopIteration
        try:
            with self._draws.drawn_from():
                if self._iterator is None:
                    _set_epoch(self._loader, self.epoch)
                    self._iterator = iter(self._loader)
                return next(self._iterator)
        except StopIteration:
            self._ended = True
            raise

    def go_on(self, at: Mapping[str, Any]) -> bool | None:
        """Continue at the place of another reading.

        Returns:
            Whether the last batch before that place is the other's; None if it is not known.
        """
        set_own_generators(self.roots(), at["generators"])
        batches = at["batches"]
        if batches > 1 and not at["drawn"] and self._can_pass_over:
            _set_epoch(self._whole, self.epoch)
            self._loader = skip_first_batches(self._whole, batches - 1)
            self.batches = batches - 1
        try:
            while self.batches < batches:
                next(self)
        except StopIteration:
            return False
        same = self._told_last() == at["last"] if batches and at["last"] is not None else None
        with suppress(StopIteration):  # that it has ended a stream does not tell before
            self._ahead.append(self._read())
        return same

    @property
    def _can_pass_over(self) -> bool:
        """Whether a batch can be read without the batches before it, if no random numbers are drawn."""
        workers, dataset = (getattr(self._whole, name, None) for name in ("num_workers", "dataset"))
        sampled = getattr(self._whole, _SAMPLER, None) is not None
        return workers == 0 and sampled and not isinstance(dataset, IterableDataset)

    @property
    def has_ended(self) -> bool:
        return self._ended and not self._ahead

    def place(self) -> dict[str, Any]:
        """The place in the data, fit for JSON, which `go_on` takes in another process."""
        now = own_generators(self.roots())
        if self._is_whole():
            return {"epoch": self.epoch + 1, "batches": 0, "drawn": False, "generators": now, "last": None}
        # A sampler begins anew in any case.
        changed = any(now[k] != self._began.get(k) for k in now if not k.startswith(_SAMPLER))
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "drawn": changed or self._draws.used,
            "generators": self._began,
            "last": self._told_last(),
        }

    def _is_whole(self) -> bool:
        try:
            return self.batches >= len(self._whole)
        except TypeError:  # the length of a stream is not known
            return False

    def _told_last(self) -> str:
        digest = hashlib.sha256()
        for t in self._last:
            digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class TrainingData:
    """The training examples as one call of `train` reads them."""

    def __init__(self, seed: int, begin_at: Mapping[str, Any] | None = None):
        """begin_at: as `place` returned it, of the run that is resumed."""
        self._seed, self._begin_at = seed % 2**63, begin_at
        self._reading: Reading | None = None
        self._iterator_given: Any = None
        self.is_as_it_was = True  # so far as can be seen, what was read before the run was cut off

    def reading(self, given: Any, loader: Any) -> Reading:
        """The batches of the epoch that the Trainer's iterator belongs to."""
        if self._reading is None or given is not self._iterator_given:
            self._reading = self._next(loader)
            self._iterator_given = given
        return self._reading

    def _next(self, loader: Any) -> Reading:
        if self._reading is not None:
            return Reading(loader, self._seed, self._reading.epoch + 1)
        if self._begin_at is None:
            return Reading(loader, self._seed, 0)
        reading = Reading(loader, self._seed, self._begin_at["epoch"])
        self.is_as_it_was = reading.go_on(self._begin_at) is not False
        return Reading(loader, self._seed, reading.epoch + 1) if reading.has_ended else reading

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Restore the generators of collators and datasets after others, such as an evaluation, have used them."""
        roots = {} if self._reading is None else self._reading.roots()
        before = own_generators(roots)
        try:
            yield
        finally:
            set_own_generators(roots, before)

    def place(self) -> dict[str, Any] | None:
        return None if self._reading is None else self._reading.place()


def _set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of a loader and its sampler, as the Trainer does."""
    sampler: Any = getattr(getattr(loader, _SAMPLER, None), _SAMPLER, None)
    for part in (loader, sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part)
