"""Minimising what has no gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from tiny_trainer import Kept, classified, losses, made, seeded, tokens, trained, weights
from torch import nn

from zo_kernels.integrations.transformers import objectives


def logits_for(classes: list[int], width: int = 4) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(classes), width).float()


def test_errors_of_classes() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    outputs = {"logits": logits_for([0, 1, 3, 3])}
    assert objectives.errors(outputs, labels, False) == 1
    assert objectives.errors((None, outputs["logits"]), labels, False) == 1


@pytest.mark.parametrize("virtual", [0, 2])
def test_errors_of_next_tokens(virtual: int) -> None:
    """The logits at a token are about the next one; a prompt's virtual tokens come before all."""
    batch = {"labels": torch.tensor([[1, 2, -100, 3]])}
    logits = logits_for([0] * virtual + [2, 0, 0, 1]).unsqueeze(0)
    labels = objectives.labels_of(batch, True)
    assert objectives.count(labels) == 2
    assert objectives.errors({"logits": logits}, labels, True) == 1  # 2 is predicted, 3 is not


def test_which_models_predict_the_next_token() -> None:
    assert objectives.predicts_the_next_token(models.opt(1))
    assert objectives.predicts_the_next_token(models.llama(1))
    assert not objectives.predicts_the_next_token(models.bert(1))
    assert not objectives.predicts_the_next_token(models.t5(1))


WITHOUT_CLASSES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "none": ({}, torch.ones(2, 3), r"integer labels in the batch, got NoneType; use 'loss'"),
    "regression": ({"labels": torch.ones(2)}, torch.ones(2, 1), r"got torch.float32 ones"),
    "other shape": ({"labels": torch.ones(2).long()}, torch.ones(2, 3, 4), r"\(2, 'classes'\), got \(2, 3, 4\)"),
}


@pytest.mark.parametrize("case", WITHOUT_CLASSES)
def test_labels_that_are_no_classes(case: str) -> None:
    batch, logits, message = WITHOUT_CLASSES[case]
    with pytest.raises(ValueError, match=message):
        objectives.errors({"logits": logits}, objectives.labels_of(batch, False), False)


@pytest.mark.parametrize("family", ["BERT", "OPT"])
def test_accuracy_is_that_of_all_microbatches(family: str, tmp_path: Path) -> None:
    """Weighted by their labels, so that it is the fraction of all, and not a mean of fractions."""
    model = seeded(models.FAMILIES[family][0], 1).eval()
    data = classified() if family == "BERT" else tokens(ignored=True)
    start, kept = copy.deepcopy(model), Kept()
    trainer = trained(
        tmp_path, model, data, objective="accuracy", gradient_accumulation_steps=3, max_steps=1, eps=1e-7,
        data_collator=kept,
    )  # fmt: skip
    wrong = total = 0
    with torch.no_grad():
        for batch in kept.batches[:3]:
            predicted, labels = start(**batch).logits.argmax(-1), batch["labels"]
            if family == "OPT":
                predicted, labels = predicted[:, :-1], labels[:, 1:]
            wrong += int(((predicted != labels) & (labels != -100)).sum())
            total += int((labels != -100).sum())
    ((_, loss, _),) = losses(trainer)
    assert loss == pytest.approx(wrong / total, rel=1e-6)
    assert 0 < loss <= 1


def test_accuracy_rises(tmp_path: Path) -> None:
    """By steps whose losses are plateaus: nothing of the gradient is used."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 5, generator=generator)
    data = [{"x": row, "labels": (row[0] > row[1]).long()} for row in x]
    model = seeded(Linear)
    trainer = trained(
        tmp_path, model, data, objective="accuracy", max_steps=60, per_device_train_batch_size=64, eps=0.1,
        learning_rate=0.3, directions=4, eval_dataset=data,
    )  # fmt: skip
    logged = [loss for _, loss, _ in losses(trainer)]
    assert sum(logged[-5:]) / 5 < 0.7 * sum(logged[:5]) / 5
    assert trainer.evaluate()["eval_loss"] > 0.1  # evaluation is by the loss, as ever


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_function(tmp_path: Path) -> None:
    """It is given the model, the batch with its labels, and the outputs; its mean over micro-batches counts."""
    model, kept, seen = seeded(models.bert, 1), Kept(), []

    def largest(given: nn.Module, inputs: Any, outputs: Any) -> float:
        seen.append((given is model, inputs["labels"].shape, outputs.logits.shape))
        return float(inputs["input_ids"].float().mean())

    trainer = trained(
        tmp_path, model, classified(), objective=largest, gradient_accumulation_steps=2, max_steps=1, data_collator=kept
    )
    expected = [batch["input_ids"].float().mean().item() for batch in kept.batches[:2]]
    assert losses(trainer)[0][1] == pytest.approx(sum(expected) / 2)
    assert seen == [(True, (2,), (2, 2))] * 4


def test_a_function_with_label_smoothing(tmp_path: Path) -> None:
    """What takes the labels out of the inputs does so from a copy."""

    def error(model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        return (outputs.logits.argmax(-1) != inputs["labels"]).float().mean()

    trainer = trained(
        tmp_path, seeded(models.bert, 1), classified(), objective=error, label_smoothing_factor=0.1, max_steps=1
    )
    assert losses(trainer)[0][1] in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_labels_that_do_not_fit_leave_the_weights(tmp_path: Path) -> None:
    model = seeded(Linear)
    before = weights(model)
    trainer = made(tmp_path, model, [{"x": torch.ones(5), "labels": torch.ones(2)}] * 4, objective="accuracy")
    with pytest.raises(ValueError, match=r"integer labels in the batch, got torch.float32"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_error_rates_of_processes_have_the_mean_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made(tmp_path, seeded(models.opt, 1).eval(), objective="accuracy")
    rows = tokens(8, ignored=True)
    batches = [torch.utils.data.default_collate(rows[i : i + 2]) for i in range(0, 8, 2)]
    with torch.no_grad():
        together = trainer._closure(trainer.model, batches, None)()
        total = sum(objectives.count(objectives.labels_of(batch, True)) for batch in batches)
        several = SimpleNamespace(num_processes=4, reduce=lambda counted, how: total)
        monkeypatch.setattr(trainer, "accelerator", several)
        apart = [trainer._closure(trainer.model, [batch], None)() for batch in batches]
    assert torch.equal(together, sum(apart) / 4)
