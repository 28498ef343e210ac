"""Tokenised examples, and the order in which batches of them are drawn."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

# Batches are drawn in groups of this size and cut from the group sorted by length: this removes most of the padding,
# and batches stay random enough. Labels are spread evenly over batches, because the noise of the estimate grows with
# the norm of the batch gradient, and a third of that norm came from the luck of the labels drawn.
_BATCHES_SORTED_TOGETHER = 16

B = TypeVar("B")


class Examples(ABC, Generic[B]):
    """One split of a data set, tokenised.

    `labels` is int64 [examples].
    """

    labels: Tensor

    @property
    @abstractmethod
    def cut(self) -> int:
        """Number of texts that were longer than allowed and were cut."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def length(self, index: int) -> int:
        """Length of an example in tokens, as it counts for padding."""

    @abstractmethod
    def token_ids(self, index: int) -> list[Any]:
        """All token ids of an example, for the digest."""

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> B:
        """These examples as a batch for a training step."""

    def whole(self, indices: Sequence[int]) -> B:
        """These examples as a batch for an evaluation."""
        return self.batch(indices)

    def check_batch_size(self, size: int) -> None:
        """Raise ValueError if the split has fewer than `size` examples."""
        if size > len(self):
            raise ValueError(f"--batch-size: expected at most {len(self)}, the number of training examples, got {size}")

    def in_order_of_length(self, size: int) -> Iterator[B]:
        """Yield every example once, shortest first, in batches of `size` for an evaluation."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), size):
            yield self.whole(order[start : start + size])

    def endless(self, size: int, generator: torch.Generator, skip: int = 0) -> Iterator[B]:
        """Yield random batches of `size` examples without end.

        Examples in a batch have similar lengths; labels have the proportions of the whole split. An epoch takes each
        example at most once and leaves out a remainder smaller than a batch. The first `skip` batches are skipped, as
        if they had been drawn before.
        """
        self.check_batch_size(size)
        return map(self.batch, islice(self._endless(size, generator), skip, None))

    def digest(self) -> str:
        """16 hex digits that identify these texts and labels."""
        rows = [[*self.token_ids(index), label] for index, label in enumerate(self.labels.tolist())]
        return hashlib.blake2s(repr(rows).encode(), digest_size=8).hexdigest()

    def _endless(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        while True:
            order = self._interleave(torch.randperm(len(self), generator=generator, device="cpu").tolist())
            order = order[: len(order) // size * size]
            for start in range(0, len(order), size * _BATCHES_SORTED_TOGETHER):
                group = order[start : start + size * _BATCHES_SORTED_TOGETHER]
                group = self._interleave(sorted(group, key=self.length))
                for turn in torch.randperm(len(group) // size, generator=generator, device="cpu").tolist():
                    yield group[turn * size : (turn + 1) * size]

    def _interleave(self, order: Sequence[int]) -> list[int]:
        """The same indices, reordered so that every label is spread evenly. Each label keeps its own order."""
        labels = self.labels[list(order)].tolist()
        total, seen = Counter(labels), Counter[int]()
        positions = []
        for label in labels:
            positions.append((seen[label] + 0.5) / total[label])
            seen[label] += 1
        return [order[at] for at in sorted(range(len(order)), key=positions.__getitem__)]


def padded(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows at their ends: token ids and a mask that is 1 for tokens, 0 for padding; both int64 [rows, longest]."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    # The mask goes by length, not by id: if the end token is used as padding, real tokens have that id, too.
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask
