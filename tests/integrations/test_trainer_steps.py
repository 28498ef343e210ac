"""A step of the trainer is a step of the optimizer, on what Trainer would have taken the gradient of."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from default_device import with_and_without
from inside import in_forward_of
from tiny_trainer import (
    BY_LENGTH,
    METHODS,
    Kept,
    Noted,
    arguments,
    assert_same,
    losses,
    made,
    points,
    seeded,
    tokens,
    trained,
    weights,
)
from torch import nn
from transformers import DataCollatorWithFlattening, EarlyStoppingCallback, Trainer, default_data_collator

import zo_kernels as zo
from zo_kernels.integrations.transformers import Diverged, ZOTrainer
from zo_kernels.integrations.transformers.anchors import anchor_batches


def by_hand(trainer: ZOTrainer, start: nn.Module, batches: list[Any], accumulated: int = 1, **options: Any) -> Any:
    """The same run without a trainer: the weights, and the losses that it logs."""
    method, of_method = METHODS[trainer.args.method]
    options = {"lr": 1e-3, "seed": trainer.args.seed, **of_method, **options}
    model = copy.deepcopy(start).eval()
    optimizer = method(model, **options)
    seen = []
    for at in range(0, 4 * accumulated, accumulated):
        group = batches[at : at + accumulated]
        closures = [lambda group=group: mean_over_tokens(model, group)]
        if isinstance(optimizer, zo.MeZOSVRG):
            loader = torch.utils.data.DataLoader(trainer.train_dataset, 2, collate_fn=default_data_collator)
            drawn = anchor_batches(loader, 5, seed=optimizer.seed, step=optimizer.step_count, rank=0, processes=1)
            closures.append(lambda drawn=drawn: mean_over_tokens(model, drawn))
        seen.append(float(optimizer.step(*closures)))
    return weights(model), seen


def mean_over_tokens(model: nn.Module, batches: list[Any]) -> torch.Tensor:
    counts = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches])
    shares = (counts.double() / counts.sum()).float().double()  # so that products with float32 losses are exact
    told = zip(batches, counts.float(), shares, strict=True)
    return sum(model(**batch, num_items_in_batch=items).loss.double() * share for batch, items, share in told)


@pytest.mark.parametrize(
    ("method", "accumulated", "distribution"),
    [("mezo", 1, "rademacher"), ("mezo", 3, "normal"), ("sparse-mezo", 3, "normal"), ("lezo", 1, "normal"),
     ("mezo-svrg", 3, "rademacher")],
)  # fmt: skip
def test_steps_are_those_of_the_optimizer(method: str, accumulated: int, distribution: str, tmp_path: Path) -> None:
    model, kept = seeded(models.opt, 2), Kept()
    start = copy.deepcopy(model)
    options: dict[str, Any] = {**METHODS[method][1], "method": method, "gradient_accumulation_steps": accumulated}
    options["distribution"] = distribution
    if method == "mezo-svrg":
        options["anchor_examples"] = 5
    trainer = trained(tmp_path, model, tokens(24, ignored=True), data_collator=kept, **options)
    batches = kept.batches
    if method == "mezo-svrg":  # two anchors have three batches each
        assert len(batches) >= 4 * accumulated + 6
        batches = [b for b in batches if not any(is_of_an_anchor(b, trainer, step) for step in (0, 2))]
    expected, seen = by_hand(trainer, start, batches, accumulated, distribution=distribution)
    assert_same(weights(model), expected)
    if distribution != "normal":
        others, _ = by_hand(trainer, start, batches, accumulated)
        assert not [name for name, value in others.items() if torch.equal(value, expected[name])]
    assert [loss for _, loss, _ in losses(trainer)] == pytest.approx(seen, rel=1e-6)
    assert {name: value for name, value in weights(model).items() if torch.equal(value, start.state_dict()[name])} == {}


def is_of_an_anchor(batch: Any, trainer: ZOTrainer, step: int) -> bool:
    loader = torch.utils.data.DataLoader(trainer.train_dataset, 2, collate_fn=default_data_collator)
    drawn = anchor_batches(loader, 5, seed=trainer.args.seed, step=step, rank=0, processes=1)
    return any(torch.equal(batch["input_ids"], other["input_ids"]) for other in drawn)


def test_a_default_device_changes_no_anchor() -> None:
    loader = torch.utils.data.DataLoader(list(range(20)), 2, collate_fn=list)
    got, expected = with_and_without(lambda: anchor_batches(loader, 5, seed=1, step=3, rank=0, processes=2))
    assert got == expected


class NormalisedByItself(nn.Module):
    """A model whose loss is a mean over its own batch, as the models outside of transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.block_mlp(2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("per_token", [True, False])
def test_microbatches_here_or_in_other_processes_give_equal_bits(
    per_token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(tmp_path, *((None, None) if per_token else (NormalisedByItself(), points())))
    trainer.model.eval()
    rows = tokens(8, ignored=True) if per_token else points(8)
    batches = [default_data_collator(rows[i : i + 2]) for i in range(0, 8, 2)]
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches) if per_token else None
    with torch.no_grad():
        together = trainer._closure(trainer.model, batches, items)()
        total = torch.tensor(float(items if per_token else 8), dtype=torch.float64)
        several = SimpleNamespace(num_processes=4, reduce=lambda counted, how: total)
        monkeypatch.setattr(trainer, "accelerator", several)
        apart = [trainer._closure(trainer.model, [batch], items)() for batch in batches]
    assert together.dtype == torch.float64
    assert torch.equal(together, sum(apart) / 4)


def test_a_loss_that_is_a_mean_of_its_batch_counts_equally(tmp_path: Path) -> None:
    model, kept = NormalisedByItself(), Kept()
    start = copy.deepcopy(model)
    trainer = trained(tmp_path, model, points(), data_collator=kept, max_steps=1, gradient_accumulation_steps=3)
    with torch.no_grad():
        at_start = sum(start(**batch)["loss"].item() for batch in kept.batches[:3]) / 3
    ((_, loss, _),) = losses(trainer)
    assert loss == pytest.approx(at_start, rel=1e-4)


class Doubled(ZOTrainer):
    grad_modes: list[bool]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.grad_modes = [*getattr(self, "grad_modes", []), torch.is_grad_enabled()]
        inputs.pop("labels")
        loss = model(**inputs).logits.float().square().mean()
        assert loss.grad_fn is None
        return (loss, {}) if return_outputs else loss


def test_compute_loss_of_a_subclass_without_a_graph(tmp_path: Path) -> None:
    """It may take the labels out, as the Trainer's own does, and no graph is built."""
    trainer = trained(tmp_path, cls=Doubled, gradient_accumulation_steps=2, max_steps=2)
    assert trainer.grad_modes == [False] * (2 * 2 * 2)  # steps, evaluations, micro-batches
    assert all(p.grad is None for p in trainer.model.parameters())


def squared(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return (outputs.logits.square().mean(-1) * (labels != -100)).sum() / num_items_in_batch


def test_losses_that_trainer_offers(tmp_path: Path) -> None:
    """compute_loss_func and label smoothing are what is minimised."""
    for i, options in enumerate(({"compute_loss_func": squared}, {"label_smoothing_factor": 0.3})):
        kept, model = Kept(), seeded(models.opt, 2)
        reference = made(tmp_path, copy.deepcopy(model).eval(), **options)
        trainer = trained(tmp_path / str(i), model, data_collator=kept, max_steps=1, eps=1e-6, **options)
        batch = kept.batches[0]
        items = (batch["labels"][:, 1:] != -100).sum()
        with torch.no_grad():
            expected = Trainer.compute_loss(reference, reference.model, dict(batch), num_items_in_batch=items)
            plain = reference.model(**batch).loss
        ((_, loss, _),) = losses(trainer)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert loss != pytest.approx(plain.item(), rel=1e-4)


def test_both_losses_see_the_same_network_and_modes_come_back(tmp_path: Path) -> None:
    model = seeded(models.opt, 2).train()
    model.config.dropout = 0.5
    for layer in model.model.decoder.layers:
        layer.dropout = 0.5
    model.model.decoder.layers[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    noted = Noted()
    trainer = trained(tmp_path, model, callbacks=[noted], learning_rate=0.0, data_collator=Kept())
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert noted.seen == [s for i in range(4) for s in (("begin", i, True), ("end", i + 1, True))]
    pairs = [record.losses[0] for record in trainer.zo_optimizer.trajectory]
    again = trained(tmp_path / "again", seeded(models.opt, 2).eval(), learning_rate=0.0, data_collator=Kept())
    assert pairs == [record.losses[0] for record in again.zo_optimizer.trajectory]


def test_kinds_of_data(tmp_path: Path) -> None:
    """Each of them changes the weights, and the steps are as many as asked for."""
    datasets = pytest.importorskip("datasets")
    rows = tokens()
    lists = [{name: value.tolist() for name, value in row.items()} for row in rows]
    uneven = [{"input_ids": r["input_ids"][: 3 + i % 5].tolist()} for i, r in enumerate(rows)]
    lengths = [{**row, "length": 3 + i % 5} for i, row in enumerate(lists)]
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "a list": (rows, {}),
        "datasets": (datasets.Dataset.from_list(lists), {}),
        "a stream": (datasets.Dataset.from_list(lists).to_iterable_dataset(), {}),
        "without padding": (uneven, {"data_collator": DataCollatorWithFlattening()}),
        "by length": (datasets.Dataset.from_list(lengths), BY_LENGTH),
    }
    for name, (data, options) in cases.items():
        model = seeded(models.llama if name == "without padding" else models.opt, 2)
        before = weights(model)
        trainer = trained(tmp_path / name, model, data, **options)
        assert trainer.zo_optimizer.step_count == trainer.state.global_step == 4, name
        assert any(not torch.equal(before[k], v) for k, v in weights(model).items()), name
        assert trainer.zo_optimizer.refused_steps == 0, name


def test_a_stream_that_ends_within_a_step(tmp_path: Path) -> None:
    """Its last micro-batches are dropped; they do not slip into the next epoch's first step."""
    datasets = pytest.importorskip("datasets")
    lists = [{name: value.tolist() for name, value in row.items()} for row in tokens(5)]
    stream, kept = datasets.Dataset.from_list(lists).to_iterable_dataset(), Kept()
    trainer = trained(
        tmp_path, None, stream, data_collator=kept, max_steps=2, gradient_accumulation_steps=2,
        per_device_train_batch_size=1, learning_rate=0.0,
    )  # fmt: skip
    model = seeded(models.opt, 2).eval()
    with torch.no_grad():
        first = mean_over_tokens(model, kept.batches[:2]).item()
    assert losses(trainer)[0][1] == pytest.approx(first, rel=1e-4)
    assert trainer.zo_optimizer.step_count == 2


def test_anchors_need_examples_with_indices(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    lists = [{name: value.tolist() for name, value in row.items()} for row in tokens(5)]
    with pytest.raises(ValueError, match=r"train_dataset: expected one with a length .*choose another method"):
        trained(tmp_path, None, datasets.Dataset.from_list(lists).to_iterable_dataset(), method="mezo-svrg")


def test_the_cache_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr("zo_kernels.integrations.transformers.trainer.clear_device_cache", lambda: emptied.append(1))
    trained(tmp_path, torch_empty_cache_steps=2)
    assert len(emptied) == 2


def test_epochs_end_with_a_smaller_step(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4)
    assert trainer.state.global_step == trainer.zo_optimizer.step_count == 4  # of 6 batches in 2 steps, twice


def test_rates_follow_the_schedule(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 0.4}
    trainer = trained(tmp_path, eps=1e-6, **options)
    rates = [record.rates[0] for record in trainer.zo_optimizer.trajectory]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.2], rel=1e-6)
    for anchor_lr, highest in ((0.1, 0.1), (None, 0.8)):
        trainer = trained(tmp_path, eps=1e-6, method="mezo-svrg", anchor_every=1, anchor_lr=anchor_lr, **options)
        rates = [record.rates[0] for record in trainer.zo_optimizer.trajectory]  # of anchors alone
        assert rates == pytest.approx([0.0, highest / 2, highest, highest / 2], rel=1e-6)


def test_logs_evaluations_and_early_stopping(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, eval_dataset=tokens(4), eval_strategy="steps", eval_steps=1, logging_steps=2, max_steps=8,
        learning_rate=0.0, perturb="in_forward", directions=3, callbacks=[EarlyStoppingCallback(2)],
        metric_for_best_model="loss", load_best_model_at_end=True, save_strategy="steps", save_steps=1,
        save_only_model=True,
    )  # fmt: skip
    assert trainer.state.global_step == 3  # nothing changes, so the second and third are no better than the first
    (log,) = (r for r in trainer.state.log_history if "loss" in r)
    gradients = [(p - m) / 2e-3 for p, m in trainer.zo_optimizer.trajectory[1].losses]
    assert log["projected_gradient"] == pytest.approx((sum(g * g for g in gradients) / 3) ** 0.5, rel=1e-3)
    assert log["refused_steps"] == 0
    assert "grad_norm" not in log
    evaluated = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r]
    assert len(evaluated) == 3
    assert len(set(evaluated)) == 1


def test_evaluate_and_predict_before_training(tmp_path: Path) -> None:
    trainer = made(tmp_path, eval_dataset=tokens(4))
    before = weights(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.predict(tokens(4)).metrics["test_loss"])
    assert trainer.zo_optimizer is None
    assert_same(weights(trainer.model), before)


class NanAt:
    """A loss that is nan in the steps of a set."""

    def __init__(self, steps: Any):
        self.calls, self.steps = itertools.count(), steps

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        step = next(self.calls) // 2  # a call that gives nan is its step's last one
        if step in self.steps:
            next(self.calls)
            return outputs.logits.sum() * float("nan")
        return outputs.logits.square().mean()


def test_a_refused_step_is_counted_and_passed_over(tmp_path: Path) -> None:
    trainer = trained(tmp_path, compute_loss_func=NanAt({1, 2}))
    assert trainer.state.global_step == trainer.zo_optimizer.step_count == 4
    assert [r["refused_steps"] for r in trainer.state.log_history if "loss" in r] == [0, 1, 2, 2]
    first, *repeated, last = [loss for _, loss, _ in losses(trainer)]
    assert repeated == [first, first]
    assert last != first


def test_a_run_of_refused_steps_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the last 10 of 14 steps .* Lower learning_rate, which is 0.001 now, eps"):
        trained(tmp_path, compute_loss_func=NanAt({0, 1, 2, *range(4, 99)}), max_steps=50)


def test_errors_of_a_loss_are_not_taken_for_refusals(tmp_path: Path) -> None:
    model = seeded(models.opt, 2)
    before = weights(model)
    with pytest.raises(ValueError, match=r"compute_loss: expected a scalar, got a tensor of shape \(2, 8, 32\)"):
        trained(tmp_path, model, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-5)


def test_steps_refused_for_another_reason_are_not_passed_over(tmp_path: Path) -> None:
    """A forward that writes to its weights, as transformers' RWKV does: the run ends, and says why, at once."""

    class Writing(ZOTrainer):
        def compute_loss(self, model: nn.Module, *more: Any, **options: Any) -> Any:
            model.lm_head.weight.mul_(0.5)
            return super().compute_loss(model, *more, **options)

    with pytest.raises(ValueError, match=r"closure: it writes to .* \(aten::mul_\) while the weights are perturbed"):
        trained(tmp_path, cls=Writing)


def test_bf16_is_autocast_of_float32_weights(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    cast = trained(tmp_path / "cast", bf16=True)
    assert cast.zo_optimizer.perturb == "in_place"
    assert {p.dtype for p in cast.model.parameters()} == {torch.float32}
    a, b = ([loss for _, loss, _ in losses(t)] for t in (plain, cast))
    assert a == pytest.approx(b, rel=2e-2)
    assert a != b


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_weights_are_perturbed_in_the_forward(autocast: bool, tmp_path: Path) -> None:
    model = seeded(models.opt, 2).to(torch.bfloat16)
    start = copy.deepcopy(model)
    before = weights(model)
    trainer = trained(tmp_path, model, bf16=autocast)
    assert trainer.zo_optimizer.perturb == "in_forward"
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items())
    zo.replay(start, tmp_path / "trajectory.zo")
    assert_same(weights(start), weights(model))


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = seeded(models.opt, 2)
    optimizer = zo.MeZO(model, lr=1e-3, seed=5)
    trainer = trained(tmp_path, model, optimizers=(optimizer, None))
    assert trainer.zo_optimizer is optimizer
    assert optimizer.step_count == 4
    assert zo.Trajectory.load(tmp_path / "trajectory.zo") == optimizer.trajectory


def test_train_again_goes_on(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.train()
    assert trainer.zo_optimizer.step_count == 8
    start = seeded(models.opt, 2)
    zo.replay(start, tmp_path / "trajectory.zo")
    assert_same(weights(start), weights(trainer.model))


def test_offloaded_weights_give_the_same_run(tmp_path: Path) -> None:
    """Evaluations before and in it, too; here both are in the CPU's memory."""
    ends = []
    for offload in (False, True):
        model = seeded(models.opt)
        args = arguments(
            tmp_path / str(offload), offload=offload, perturb="in_forward", eval_strategy="steps", eval_steps=2
        )
        trainer = ZOTrainer(model, args, train_dataset=tokens(), eval_dataset=tokens(6))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        told = [{k: v for k, v in log.items() if k in ("loss", "eval_loss")} for log in trainer.state.log_history]
        ends.append(([before, told], {n: p.clone() for n, p in model.named_parameters()}))
        assert args.place_model_on_device is not True
    assert in_forward_of(trainer.zo_optimizer).bytes_copied > 0 and ends[0][0] == ends[1][0]
    assert all(torch.equal(p, ends[1][1][n]) for n, p in ends[0][1].items())
