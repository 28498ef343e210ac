"""Score candidates with a causal language model, and generate answers with one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_kernels.finetune.data.examples import Examples, padded
from zo_kernels.finetune.prompts.render import CausalPrompt, CausalPrompts
from zo_kernels.finetune.prompts.task_data import Example


@dataclass(frozen=True)
class CausalBatch:
    """A batch of candidates, one in each row. The candidates of an example follow each other; padding is at the ends.

    `input_ids`, `attention_mask`: int64 [rows, tokens].
    `places`: int64 [places], the positions that predict a token of a candidate in any row.
    `targets`: int64 [rows, places], the tokens after these positions.
    `scored`: bool [rows, places], which targets belong to the candidate of the row.
    `labels`: int64 [examples], the index of the right candidate among the rows of the example.
    `examples`: the indices of the examples in the split.
    """

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor
    targets: Tensor
    scored: Tensor
    labels: Tensor
    examples: list[int]


@dataclass(frozen=True)
class CausalTexts(Examples[CausalBatch]):
    """The prompts of a split. With `right_only`, training batches hold only the right candidate of each example."""

    prompts: list[CausalPrompt]
    labels: Tensor
    references: list[tuple[str, ...]]
    pad_id: int
    device: torch.device
    right_only: bool

    @classmethod
    def of(
        cls, render: CausalPrompts, examples: Sequence[Example], pad_id: int, device: torch.device, right_only: bool
    ) -> CausalTexts:
        return cls(
            [render(example.fields) for example in examples],
            torch.tensor([example.label for example in examples], dtype=torch.int64, device="cpu"),
            [example.references for example in examples],
            pad_id,
            device,
            right_only,
        )

    @property
    def cut(self) -> int:
        return sum(prompt.cut for prompt in self.prompts)

    def length(self, index: int) -> int:
        return max(map(len, self.prompts[index].rows))

    def token_ids(self, index: int) -> list[Any]:
        return self.prompts[index].rows

    def batch(self, indices: Sequence[int]) -> CausalBatch:
        return self._batch(indices, self.right_only)

    def whole(self, indices: Sequence[int]) -> CausalBatch:
        return self._batch(indices, right_only=False)

    def _batch(self, indices: Sequence[int], right_only: bool) -> CausalBatch:
        labels = self.labels[list(indices)]
        rows, answers = [], []
        for index, label in zip(indices, labels.tolist(), strict=True):
            prompt = self.prompts[index]
            chosen = [label] if right_only else range(len(prompt.rows))
            rows += [torch.tensor(prompt.rows[candidate], device="cpu") for candidate in chosen]
            answers += [prompt.answers[candidate] for candidate in chosen]
        ids, mask = padded(rows, self.pad_id)
        predicting = torch.zeros_like(ids, dtype=torch.bool)
        for at, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            predicting[at, len(row) - answer - 1 : len(row) - 1] = True
        places = predicting.any(0).nonzero().squeeze(1)
        labels = torch.zeros_like(labels) if right_only else labels
        return CausalBatch(
            ids.to(self.device),
            mask.to(self.device),
            places.to(self.device),
            ids[:, places + 1].to(self.device),
            predicting[:, places].to(self.device),
            labels.to(self.device),
            list(indices),
        )


def log_likelihoods(model: Any, batch: CausalBatch) -> tuple[Tensor, Tensor]:
    """The summed log probabilities of each candidate's tokens, and the number of tokens; fp32 [examples, candidates].

    The softmax is computed in fp32 for weights of any dtype. If the model supports it, logits are computed only where
    they are used.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=batch.places).logits
    else:
        logits = model(**inputs).logits[:, batch.places]
    each = logits.float().log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    # Not multiplied by the mask: a token that is not scored may have probability 0, and 0 * -inf is nan.
    sums = each.masked_fill(~batch.scored, 0.0).sum(1)
    shape = (len(batch.labels), -1)
    return sums.view(shape), batch.scored.sum(1).float().view(shape)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], most: int) -> list[str]:
    """Generate greedily, at most `most` tokens, up to the end of the line or of the text."""
    device = next(model.parameters()).device
    # Padding goes before the prompts, since generation continues at their ends.
    ids, mask = padded([torch.tensor(prompt[::-1], device="cpu") for prompt in prompts], tokenizer.pad_token_id)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    ends = [*newline, tokenizer.eos_token_id]
    tokens = model.generate(
        input_ids=ids.flip(1).to(device),
        attention_mask=mask.flip(1).to(device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        eos_token_id=[end for end in ends if end is not None and end != tokenizer.unk_token_id] or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]
