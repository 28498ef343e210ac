"""The texts of a classifier, tokenised once, and batches of them padded to their longest text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels.finetune.data.examples import Examples, padded


@dataclass(frozen=True)
class Batch:
    """int64 tensors: `input_ids` and `attention_mask` [batch, tokens], `labels` [batch]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Texts(Examples[Batch]):
    """The token ids and the label of every text of a split."""

    ids: list[Tensor]
    labels: Tensor
    pad_id: int
    max_tokens: int
    device: torch.device
    cut: int = 0  # number of texts that were longer than max_tokens

    @classmethod
    def tokenize(
        cls, tokenizer: Any, texts: Sequence[str], labels: Iterable[int], max_tokens: int, device: torch.device
    ) -> Texts:
        """Tokenise texts, cut to `max_tokens` tokens. Raises ValueError if the tokenizer makes no tokens of a text."""
        # Ask for one token more, to see which texts are too long; only those are tokenised again.
        encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens + 1)["input_ids"]
        long = [at for at, row in enumerate(encoded) if len(row) > max_tokens]
        if long:
            again = tokenizer([texts[at] for at in long], truncation=True, max_length=max_tokens)["input_ids"]
            for at, row in zip(long, again, strict=True):
                encoded[at] = row
        for text, row in zip(texts, encoded, strict=True):
            if not row:
                raise ValueError(
                    f"--model: expected a tokenizer that makes tokens of every text, got none for {text!r}"
                )
        ids = [torch.tensor(row, dtype=torch.int64, device="cpu") for row in encoded]
        return cls(
            ids,
            torch.tensor(list(labels), dtype=torch.int64, device="cpu"),
            tokenizer.pad_token_id,
            max_tokens,
            device,
            len(long),
        )

    def length(self, index: int) -> int:
        return len(self.ids[index])

    def token_ids(self, index: int) -> list[int]:
        return self.ids[index].tolist()

    def batch(self, indices: Sequence[int]) -> Batch:
        ids, mask = padded([self.ids[index] for index in indices], self.pad_id)
        labels = self.labels[list(indices)]
        return Batch(ids.to(self.device), mask.to(self.device), labels.to(self.device))
