"""Score label words at the mask of a masked language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels.finetune.data.examples import Examples, padded
from zo_kernels.finetune.prompts.render import MaskedPrompt, MaskedPrompts
from zo_kernels.finetune.prompts.task_data import Example


@dataclass(frozen=True)
class MaskedBatch:
    """int64 tensors: `input_ids` and `attention_mask` [batch, tokens], `masks` (positions) and `labels` [batch]."""

    input_ids: Tensor
    attention_mask: Tensor
    masks: Tensor
    labels: Tensor


@dataclass(frozen=True)
class MaskedTexts(Examples[MaskedBatch]):
    """The prompts of a split."""

    prompts: list[MaskedPrompt]
    labels: Tensor
    pad_id: int
    device: torch.device

    @classmethod
    def of(cls, render: MaskedPrompts, examples: Sequence[Example], pad_id: int, device: torch.device) -> MaskedTexts:
        labels = torch.tensor([example.label for example in examples], dtype=torch.int64, device="cpu")
        return cls([render(example.fields) for example in examples], labels, pad_id, device)

    @property
    def cut(self) -> int:
        return sum(prompt.cut for prompt in self.prompts)

    def length(self, index: int) -> int:
        return len(self.prompts[index].ids)

    def token_ids(self, index: int) -> list[int]:
        return self.prompts[index].ids

    def batch(self, indices: Sequence[int]) -> MaskedBatch:
        prompts = [self.prompts[index] for index in indices]
        ids, mask = padded([torch.tensor(prompt.ids, device="cpu") for prompt in prompts], self.pad_id)
        masks = torch.tensor([prompt.mask for prompt in prompts], device="cpu")
        tensors = (ids, mask, masks, self.labels[list(indices)])
        return MaskedBatch(*(tensor.to(self.device) for tensor in tensors))


def label_logits(model: Any, batch: MaskedBatch, words: Sequence[int]) -> Tensor:
    """The logits of the label words at the mask, fp32 [batch, labels]. `words` are their token ids."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = torch.arange(len(batch.masks), device=logits.device)
    return logits[rows, batch.masks][:, list(words)].float()
