"""Train a language model on the prompts of a task: its data, its loss, its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo_kernels.finetune.config import Config
from zo_kernels.finetune.data.examples import Examples
from zo_kernels.finetune.folders.metrics import Evaluation
from zo_kernels.finetune.learner import Learner, no_bar
from zo_kernels.finetune.pretrained import freeze
from zo_kernels.finetune.prompts import answers
from zo_kernels.finetune.prompts.causal import CausalTexts
from zo_kernels.finetune.prompts.language_model import load_language_model, tokens_allowed
from zo_kernels.finetune.prompts.predictor import Prompted
from zo_kernels.finetune.prompts.task_data import load_task
from zo_kernels.finetune.tasks import TASKS


@dataclass(frozen=True)
class PromptLearner(Learner):
    """Trains a language model on a task.

    `over` chooses the loss: "candidates" is the cross-entropy of their scores, "tokens" the mean negative log
    likelihood of the tokens of the right answer. `objective` is what training minimises on a batch: "loss", "accuracy"
    (as 1 - accuracy) or "f1" (as 1 - F1). The last two have no gradient.
    """

    predictor: Prompted
    train: Examples[Any]
    dev: Examples[Any]
    test: Examples[Any]
    device: torch.device
    over: str
    objective: str
    batch_size: int
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        return {
            "task": self.predictor.task_name,
            "kind": self.predictor.kind,
            "loss": self.over,
            "objective": self.objective,
        }

    def loss(self, batch: Any) -> Tensor:
        if self.objective == "f1":
            return torch.tensor(1 - self._generated(self.train, batch)[1], device=self.device)
        sums, counts = self.predictor.likelihoods(batch)
        if self.objective == "accuracy":
            return 1 - ((sums / counts).argmax(1) == batch.labels).float().mean()
        total, weight = self._summed_loss(sums, counts, batch.labels)
        return total / weight

    @torch.no_grad()
    def evaluate(self, examples: Examples[Any], done: Callable[[int], object] = no_bar) -> Evaluation:
        total, weight, right, overlap = 0.0, 0.0, 0.0, 0.0
        for batch in examples.in_order_of_length(self.batch_size):
            sums, counts = self.predictor.likelihoods(batch)
            loss, of = self._summed_loss(sums, counts, batch.labels)
            total, weight = total + loss.item(), weight + of.item()
            if self.predictor.generates:
                exact, f1 = self._generated(examples, batch)
                right, overlap = right + exact * len(batch.labels), overlap + f1 * len(batch.labels)
            else:
                right += int(((sums / counts).argmax(1) == batch.labels).sum())
            done(len(batch.labels))
        f1_of_all = overlap / len(examples) if self.predictor.generates else None
        return Evaluation(total / weight, right / len(examples), f1_of_all)

    def _summed_loss(self, sums: Tensor, counts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the loss over examples or tokens, and the number of these."""
        if self.over == "candidates":
            each = F.cross_entropy(sums / counts, labels, reduction="sum")
            return each, torch.tensor(float(len(labels)), device=each.device)
        right = labels.unsqueeze(1)
        return -sums.gather(1, right).sum(), counts.gather(1, right).sum()

    def _generated(self, examples: Examples[Any], batch: Any) -> tuple[float, float]:
        """Mean exact match and mean F1 of the answers generated for a batch."""
        assert isinstance(examples, CausalTexts)
        texts = self.predictor.generate(examples, batch.examples)
        references = [examples.references[index] for index in batch.examples]
        exact = [answers.exact_match(text, right) for text, right in zip(texts, references, strict=True)]
        f1 = [answers.f1(text, right) for text, right in zip(texts, references, strict=True)]
        return sum(exact) / len(exact), sum(f1) / len(f1)


def prompt_learner(config: Config, device: torch.device, dtype: torch.dtype) -> PromptLearner:
    """Load the data and the model.

    Raises ValueError, TypeError or OSError if the settings, the data or the model cannot be used.
    """
    assert config.task is not None and config.loss is not None
    data = load_task(
        config.task, TASKS[config.task], config.task_data, config.seed,
        config.train_examples, config.dev_examples, config.test_examples,
    )  # fmt: skip
    predictor = load_start(config, dtype)
    predictor.model.to(device)
    if predictor.kind == "masked" and config.loss != "candidates":
        raise ValueError("--loss: expected candidates for a masked model, which scores single words, got tokens")
    right_only = config.loss == "tokens" and config.objective != "accuracy"
    train = predictor.prepare(data.train, right_only=right_only)
    train.check_batch_size(config.batch_size)
    freeze(predictor.model, config.freeze)
    return PromptLearner(
        predictor,
        train,
        predictor.prepare(data.dev),
        predictor.prepare(data.test),
        device,
        config.loss,
        config.objective,
        config.batch_size,
        data.notes,
    )


def load_start(config: Config, dtype: torch.dtype) -> Prompted:
    """The pretrained model that a run starts with, on the CPU."""
    assert config.model is not None and config.task is not None
    model, tokenizer, kind = load_language_model(config.model, config.model_kind, dtype)
    max_tokens = tokens_allowed(model, tokenizer, config.max_tokens)
    return Prompted(model, tokenizer, config.task, kind, max_tokens, config.max_new_tokens)
