"""What ZOTrainingArguments and ZOTrainer accept, and what they say to what they do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tiny_trainer import arguments, assert_same, made, seeded, tokens, trained, weights
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments
from zo_kernels.integrations.transformers.arguments import _WITHOUT_MEANING

KNOWN = {known.name for known in dataclasses.fields(TrainingArguments)}
GIVEN: dict[str, tuple[Any, str]] = {
    "optim": ("adamw_torch", r"'sgd', got 'adamw_torch': .* choose it by method="),
    "optim_args": ("betas=1", r"choose it by method="),
    "optim_target_modules": ("all-linear", r"choose it by method="),
    "adam_beta1": (0.8, r"expected 0.9, got 0.8: .* choose it by method="),
    "adam_beta2": (0.9, r"choose it by method="),
    "adam_epsilon": (1e-6, r"choose it by method="),
    "max_grad_norm": (1.0, r"expected 0.0, got 1.0: there is no gradient to clip; a smaller learning_rate"),
    "activation_checkpointing": (True, r"no activations are kept"),
    "gradient_checkpointing": (True, r"no activations are kept"),
    "fp16": (True, r"load the model in float16 .* or set bf16=True"),
    "deepspeed": ("ds.json", r"leave it out, .* offload=True, or shard it with fully_shard"),
    "fsdp": ("full_shard", r"leave it out, .* offload=True, or shard it with fully_shard"),
    "neftune_noise_alpha": (5.0, r"evaluation mode"),
    "auto_find_batch_size": (True, r"lower per_device_train_batch_size"),
    "ddp_find_unused_parameters": (True, r"not wrapped"),
    "ddp_bucket_cap_mb": (5, r"not wrapped"),
    "ddp_broadcast_buffers": (True, r"not wrapped"),
    "ddp_static_graph": (True, r"not wrapped"),
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": ({"method": "adam"}, ValueError, r"method: expected one of 'mezo', .* got 'adam'"),
    "eps": ({"eps": 0.0}, ValueError, r"eps: "),
    "eps of text": ({"eps": "small"}, TypeError, r"eps: "),
    "directions": ({"directions": 0}, ValueError, r"directions: "),
    "sparsity": ({"sparsity": 1.0}, ValueError, r"sparsity: "),
    "drop": ({"drop": -0.1}, ValueError, r"drop: "),
    "perturb": ({"perturb": "never"}, ValueError, r"perturb: "),
    "rounding": ({"rounding": "up"}, ValueError, r"rounding: "),
    "distribution": ({"distribution": "signs"}, ValueError, r"distribution: .*'normal', 'rademacher', got 'signs'"),
    "estimator": (
        {"estimator": "both"},
        ValueError,
        r"estimator: expected one of 'two_sided', 'one_sided', got 'both'",
    ),
    "estimator of fzoo": (
        {"method": "fzoo", "estimator": "two_sided"},
        ValueError,
        r"estimator: expected None .*'fzoo', .*'two_sided'",
    ),
    "normalize": ({"normalize": "max"}, ValueError, r"normalize: expected one of 'none', 'std', 'rms', got 'max'"),
    "normalize of svrg": (
        {"method": "mezo-svrg", "normalize": "rms"},
        ValueError,
        r"normalize: expected None .*'mezo-svrg', .*'rms'",
    ),
    "mask": ({"mask": "new", "sparsity": 0.5}, ValueError, r"mask: expected one of 'redrawn', 'kept', got 'new'"),
    "mask of all": ({"mask": "kept"}, ValueError, r"mask: expected None without sparsity, got 'kept'"),
    "anneal": ({"method": "mezo-svrg", "anneal": 1.0}, ValueError, r"anneal: expected a finite number in \(1.0"),
    "anneal above": ({"method": "mezo-svrg", "anneal_above": 2.0}, ValueError, r"anneal_above: .* without anneal"),
    "annealing without svrg": ({"anneal": 5.0}, ValueError, r"anneal: expected method='mezo-svrg', .* got 'mezo'"),
    "zo_seed": ({"zo_seed": -1}, ValueError, r"zo_seed: "),
    "objective": ({"objective": "f1"}, ValueError, r"objective: "),
    "objective of code": ({"objective": len}, TypeError, r"objective: "),
    "parallel": ({"parallel": "model"}, ValueError, r"parallel: "),
    "parallel_check_every": ({"parallel_check_every": -1}, ValueError, r"parallel_check_every: "),
    "anchor_examples": ({"method": "mezo-svrg", "anchor_examples": 0}, ValueError, r"anchor_examples: "),
    "anchor_lr": ({"method": "mezo-svrg", "anchor_lr": -1.0}, ValueError, r"anchor_lr: "),
    "an anchor without svrg": ({"anchor_every": 5}, ValueError, r"anchor_every: expected method='mezo-svrg'.*'mezo'"),
}


def test_all_that_has_no_meaning_is_tested() -> None:
    assert GIVEN.keys() == _WITHOUT_MEANING.keys()


@pytest.mark.parametrize("name", [name for name in GIVEN if name in KNOWN])
def test_options_about_gradients_are_refused(name: str, tmp_path: Path) -> None:
    value, message = GIVEN[name]
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str, tmp_path: Path) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        arguments(tmp_path, **options)


def test_defaults_are_harmless_and_survive_a_round_trip(tmp_path: Path) -> None:
    args = ZOTrainingArguments(output_dir=str(tmp_path), ddp_find_unused_parameters=False, use_cpu=True)
    assert (args.max_grad_norm, args.optim, args.learning_rate) == (0.0, "sgd", 1e-6)
    other = dataclasses.replace(args, method="lezo")
    assert other.method == "lezo"
    json.loads(args.to_json_string())


def test_command_line(tmp_path: Path) -> None:
    command = HfArgumentParser(ZOTrainingArguments)
    line = f"--output_dir {tmp_path} --use_cpu --method mezo-svrg --anchor_lr 1e-4 --drop 0.5 --objective accuracy"
    line += " --distribution rademacher"
    (args,) = command.parse_args_into_dataclasses(line.split())
    assert (args.method, args.anchor_lr, args.drop, args.sparsity) == ("mezo-svrg", 1e-4, 0.5, None)
    assert (args.objective, args.zo_seed, args.directions) == ("accuracy", None, None)
    assert (args.distribution, arguments(tmp_path).distribution) == ("rademacher", None)
    ours = {known.name: known for known in dataclasses.fields(ZOTrainingArguments) if known.name not in KNOWN}
    assert all(known.metadata["help"] for known in ours.values())
    with pytest.raises(SystemExit):
        command.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--method", "adam"])


def test_options_reach_the_optimizer(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, method="mezo-svrg", eps=1e-4, directions=2, sparsity=0.25, drop=0.5, weight_decay=0.1, max_steps=1,
        anchor_every=7, anchor_lr=0.5, perturb="in_forward", rounding="nearest", zo_seed=9, backend="reference",
        distribution="rademacher", mask="kept", anneal=5.0, anneal_above=1.5,
    )  # fmt: skip
    optimizer: Any = trainer.zo_optimizer
    (group,) = optimizer.param_groups
    assert (group["eps"], group["sparsity"], group["weight_decay"], group["anchor_lr"]) == (1e-4, 0.25, 0.1, 0.5)
    assert (optimizer.directions, optimizer.drop, optimizer.anchor_every, optimizer.seed) == (2, 0.5, 7, 9)
    assert (optimizer.perturb, optimizer.rounding, optimizer.backend) == ("in_forward", "nearest", "reference")
    assert optimizer.distribution == optimizer.trajectory.setups[0][1].distribution == "rademacher"
    assert (optimizer.mask, optimizer.anneal, optimizer.anneal_above) == ("kept", 5.0, 1.5)
    other = trained(tmp_path, max_steps=1, estimator="one_sided", normalize="rms").zo_optimizer
    assert (other.estimator, other.normalize, other.directions, other.distribution) == ("one_sided", "rms", 1, "normal")
    assert trained(tmp_path, max_steps=1, seed=3).zo_optimizer.seed == 3


@pytest.mark.parametrize("method", ["mezo-svrg", "fzoo"])
def test_a_rate_is_found_before_training(method: str, tmp_path: Path) -> None:
    """By the arguments' method, at the weights that training then begins with; and nothing is left of it."""
    options: dict[str, Any] = {"method": method, "directions": 2, "max_steps": 1}
    options |= {"anchor_examples": 4} if method == "mezo-svrg" else {}
    trainer, expected = made(tmp_path / "a", **options), weights(trained(tmp_path / "b", **options).model)
    before, state = weights(trainer.model), torch.get_rng_state()
    found = trainer.find_lr(steps=10, start=2.0**-10)
    assert_same(weights(trainer.model), before)
    assert torch.equal(torch.get_rng_state(), state) and trainer.optimizer is None and trainer.model.training
    assert 2.0**-10 in [each.lr for each in found.tried] and found.steps == 10
    assert found.lr == trainer.find_lr(steps=10, start=2.0**-10).lr
    trainer.train()
    assert_same(weights(trainer.model), expected)
    with pytest.raises(ValueError, match=r"optimizers: expected none yet, .*got .*call find_lr before train"):
        trainer.find_lr()
    with pytest.raises(ValueError, match=r"train_dataset: expected one with a length and indices, .* find_lr draw"):
        made(tmp_path / "c", data=iter_only(), **{**options, "method": "mezo", "anchor_examples": None}).find_lr()


def iter_only() -> Any:
    return type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(tokens())})()


def test_what_needs_gradients_or_another_class(tmp_path: Path) -> None:
    model = seeded(models.opt, 1)
    with pytest.raises(TypeError, match=r"args: expected ZOTrainingArguments, got TrainingArguments"):
        ZOTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match=r"optimizers: expected an optimizer of zo_kernels, got SGD"):
        made(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs: .* args.method"):
        ZOTrainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    with pytest.raises(TypeError, match=r"objective: expected 'loss', 'accuracy' or a function, got 'f1'"):
        made(tmp_path, model, objective="f1")


def test_what_the_machine_or_a_launcher_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"n_gpu: expected one GPU a process, got 2, .*torchrun"):
        ZOTrainer(seeded(models.opt, 1), args)
    create = ZOTrainer.create_accelerator_and_postprocess

    def with_fsdp(self: ZOTrainer) -> None:
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(ZOTrainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(ValueError, match=r"accelerate: expected a configuration without DeepSpeed, FSDP and fp16"):
        made(tmp_path)


def test_compiled_models_and_perturbation_in_the_forward(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch_compile: expected False, .* perturb='in_place'"):
        trained(tmp_path, torch_compile=True, perturb="in_forward")
    compiled = seeded(models.opt, 1)
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match=r"'in_forward' cannot be: .* compiled"):
        trained(tmp_path, compiled, perturb="in_forward")


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_compiled_model_is_perturbed_in_place(tmp_path: Path) -> None:
    data = [{"x": torch.arange(3.0) + i, "labels": torch.tensor(i % 2)} for i in range(8)]
    plain = trained(tmp_path / "plain", seeded(OneHead), data)
    compiled = trained(tmp_path / "compiled", seeded(OneHead), data, torch_compile=True, torch_compile_backend="eager")
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    assert torch.equal(plain.model.head.weight, compiled.model.head.weight)
    assert not torch.equal(plain.model.head.weight, seeded(OneHead).head.weight)


def test_processes_do_not_wrap_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that there are several, accelerate would put a DistributedDataParallel round it."""
    trainer = made(tmp_path, OneHead(), [])
    monkeypatch.setattr(type(trainer.accelerator), "multi_device", True)
    assert trainer.accelerator.prepare(trainer.model) is trainer.model
    optimizer = zo.MeZO(trainer.model, lr=0.1)
    prepared = trainer.accelerator.prepare(optimizer)
    assert prepared.optimizer is optimizer
    prepared.step()  # what the Trainer's loop calls after the training step
    assert optimizer.step_count == 0
    assert trainer.accelerator.prepare(prepared) is prepared


@pytest.mark.parametrize(("theirs", "ours"), [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda:1", "cuda:1")])
def test_a_cpu_has_no_number(theirs: str, ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are restored to the device of the arguments, and `torch.load` knows no "cpu:0"."""
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device(theirs)))
    assert arguments(tmp_path).device == torch.device(ours)
