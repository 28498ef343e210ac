"""Texts tokenised once, and batches of them padded no further than their longest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# So many batches are drawn at a time and cut from one order by length: most of the padding goes, and which
# texts meet in a batch stays random enough. Labels are spread evenly over batches because the noise of the
# estimate grows with the norm of the batch gradient, a third of which was the luck of the labels drawn.
_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class Batch:
    """int64 tensors: `input_ids` and `attention_mask` [batch, tokens], `labels` [batch]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Texts:
    """Token ids of every text, and its label."""

    ids: list[Tensor]
    labels: Tensor
    pad_id: int
    max_tokens: int
    device: torch.device
    cut: int = 0  # how many were longer than max_tokens

    @classmethod
    def tokenize(
        cls, tokenizer: Any, texts: Sequence[str], labels: Iterable[int], max_tokens: int, device: torch.device
    ) -> Texts:
        """Raises ValueError if the tokenizer makes no tokens of a text."""
        encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
        for text, row in zip(texts, encoded, strict=True):
            if not row:
                raise ValueError(f"--model: expected a tokenizer that makes tokens of every text, got none of {text!r}")
        one_more = tokenizer(list(texts), truncation=True, max_length=max_tokens + 1)["input_ids"]
        ids = [torch.tensor(row, dtype=torch.int64) for row in encoded]
        return cls(
            ids,
            torch.tensor(list(labels), dtype=torch.int64),
            tokenizer.pad_token_id,
            max_tokens,
            device,
            sum(len(row) > max_tokens for row in one_more),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def check_batch_size(self, size: int) -> None:
        """Raise ValueError if there are fewer than `size` texts."""
        if size > len(self):
            raise ValueError(f"--batch-size: expected at most {len(self)}, the training examples, got {size}")

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = [self.ids[index] for index in indices]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        # By length and not by id: a model whose padding is its end token has real tokens with that id.
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = self.labels[list(indices)]
        return Batch(ids.to(self.device), mask.to(self.device), labels.to(self.device))

    def in_order_of_length(self, size: int) -> Iterator[Batch]:
        """Every text once, shortest first, in batches of `size`."""
        order = sorted(range(len(self)), key=lambda index: len(self.ids[index]))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def endless(self, size: int, generator: torch.Generator, skip: int = 0) -> Iterator[Batch]:
        """Random batches of `size` texts for ever: of similar length, labels in the proportions of the whole set.

        An epoch takes each text at most once; a remainder smaller than a batch is left out. The first `skip` batches
        are left out too, as if they had been drawn.
        """
        self.check_batch_size(size)
        return map(self.batch, islice(self._endless(size, generator), skip, None))

    def _endless(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        while True:
            order = self._interleave(torch.randperm(len(self), generator=generator).tolist())
            order = order[: len(order) // size * size]
            for start in range(0, len(order), size * _BATCHES_SORTED_TOGETHER):
                group = order[start : start + size * _BATCHES_SORTED_TOGETHER]
                group = self._interleave(sorted(group, key=lambda index: len(self.ids[index])))
                for turn in torch.randperm(len(group) // size, generator=generator).tolist():
                    yield group[turn * size : (turn + 1) * size]

    def digest(self) -> str:
        """16 hex digits that tell these texts and labels from others."""
        rows = [[*row.tolist(), label] for row, label in zip(self.ids, self.labels.tolist(), strict=True)]
        return hashlib.blake2s(repr(rows).encode(), digest_size=8).hexdigest()

    def _interleave(self, order: Sequence[int]) -> list[int]:
        """The same indices with each label's spread evenly from first to last, in the order they came in."""
        labels = self.labels[list(order)].tolist()
        total, seen = Counter(labels), Counter[int]()
        positions = []
        for label in labels:
            positions.append((seen[label] + 0.5) / total[label])
            seen[label] += 1
        return [order[at] for at in sorted(range(len(order)), key=positions.__getitem__)]
