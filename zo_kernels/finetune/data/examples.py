"""Examples that have been tokenised, and the order in which batches of them are drawn."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

# So many batches are drawn at a time and cut from one order by length: most of the padding goes, and which
# texts meet in a batch stays random enough. Labels are spread evenly over batches because the noise of the
# estimate grows with the norm of the batch gradient, a third of which was the luck of the labels drawn.
_BATCHES_SORTED_TOGETHER = 16

B = TypeVar("B")


class Examples(ABC, Generic[B]):
    """A split of a data set. `labels` is int64 [examples]; `cut` counts the texts that were longer than allowed."""

    labels: Tensor
    cut: int

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def length(self, index: int) -> int:
        """In tokens, of what a batch pads."""

    @abstractmethod
    def token_ids(self, index: int) -> list[Any]:
        """All of them, for the digest."""

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> B:
        """What a training step needs of these examples."""

    def whole(self, indices: Sequence[int]) -> B:
        """What an evaluation needs of these examples."""
        return self.batch(indices)

    def check_batch_size(self, size: int) -> None:
        """Raise ValueError if there are fewer than `size` texts."""
        if size > len(self):
            raise ValueError(f"--batch-size: expected at most {len(self)}, the training examples, got {size}")

    def in_order_of_length(self, size: int) -> Iterator[B]:
        """Every example once, shortest first, in batches of `size` for an evaluation."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), size):
            yield self.whole(order[start : start + size])

    def endless(self, size: int, generator: torch.Generator, skip: int = 0) -> Iterator[B]:
        """Random batches of `size` texts for ever: of similar length, labels in the proportions of the whole set.

        An epoch takes each text at most once; a remainder smaller than a batch is left out. The first `skip` batches
        are left out too, as if they had been drawn.
        """
        self.check_batch_size(size)
        return map(self.batch, islice(self._endless(size, generator), skip, None))

    def digest(self) -> str:
        """16 hex digits that tell these texts and labels from others."""
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
        """The same indices with each label's spread evenly from first to last, in the order they came in."""
        labels = self.labels[list(order)].tolist()
        total, seen = Counter(labels), Counter[int]()
        positions = []
        for label in labels:
            positions.append((seen[label] + 0.5) / total[label])
            seen[label] += 1
        return [order[at] for at in sorted(range(len(order)), key=positions.__getitem__)]


def padded(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """int64 [rows, longest]: the rows with padding at their ends, and 1 where they are not padding."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    # By length and not by id: a model whose padding is its end token has real tokens with that id.
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask
