"""Runs of a ZOTrainer on tiny random models, and what a test looks at afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer, ZOTrainingArguments

METHODS: dict[str, tuple[type[zo.ZeroOrderOptimizer], dict[str, Any]]] = {
    "mezo": (zo.MeZO, {}),
    "sparse-mezo": (zo.SparseMeZO, {"sparsity": 0.5}),
    "lezo": (zo.LeZO, {"drop": 0.5}),
    "mezo-svrg": (zo.MeZOSVRG, {"anchor_every": 2, "anchor_lr": 1e-3}),
    "fzoo": (zo.FZOO, {"directions": 3}),
}
# Batches of examples of about one length, as transformers 5 and those before call it.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"} if int(version("transformers").split(".")[0]) >= 5
    else {"group_by_length": True}
)  # fmt: skip


def arguments(out: Path, **options: Any) -> ZOTrainingArguments:
    """Of a run of four quiet steps on the CPU."""
    common = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return ZOTrainingArguments(output_dir=str(out), **{**common, **options})


def seeded(build: Any, *arguments: Any) -> nn.Module:
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*arguments)


def tokens(count: int = 12, length: int = 8, ignored: bool = False) -> list[dict[str, Tensor]]:
    """Random sequences with labels for a causal language model, some of them ignored if asked for."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        ids = torch.randint(2, 32, (length,), generator=generator)
        labels = ids.clone()
        if ignored:
            labels[: i % (length - 1)] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def points(count: int = 12) -> list[dict[str, Tensor]]:
    """Random inputs of a block MLP, of three classes."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, generator=generator), "labels": torch.tensor(i % 3)} for i in range(count)]


def classified(count: int = 12, length: int = 8) -> list[dict[str, Any]]:
    """Random sequences, half of them of one class."""
    return [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(tokens(count, length))]


class Kept:
    """A collator that keeps what it made."""

    def __init__(self, collate: Any = default_data_collator):
        self.batches: list[Any] = []
        self._collate = collate

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        self.batches.append(self._collate(features))
        return copy.deepcopy(self.batches[-1])


class Noted(TrainerCallback):
    """What a callback saw: its event, the step, whether the model was in training mode."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, bool]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append(("begin", state.global_step, given["model"].training))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append(("end", state.global_step, given["model"].training))


def trained(out: Path, model: nn.Module | None = None, data: Any = None, **options: Any) -> ZOTrainer:
    """After its run; keywords of ZOTrainer go to it, the others to its arguments."""
    trainer = made(out, model, data, **options)
    trainer.train()
    return trainer


def made(out: Path, model: nn.Module | None = None, data: Any = None, **options: Any) -> ZOTrainer:
    """Before its run."""
    of_trainer = ("data_collator", "callbacks", "compute_loss_func", "eval_dataset", "objective", "optimizers", "cls")
    own = {name: options.pop(name) for name in of_trainer if name in options}
    model = seeded(models.opt, 2) if model is None else model
    data = tokens() if data is None else data
    return own.pop("cls", ZOTrainer)(model=model, args=arguments(out, **options), train_dataset=data, **own)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def losses(trainer: ZOTrainer) -> list[tuple[int, float, float]]:
    """Of each log: the step, the loss, and the learning rate."""
    return [(r["step"], r["loss"], r["learning_rate"]) for r in trainer.state.log_history if "loss" in r]


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
