"""What a resumed run reads is what the run would have read; what it was given anew is named."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from tiny_trainer import BY_LENGTH, assert_same, losses, made, seeded, tokens, trained, weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, default_data_collator

from zo_kernels.integrations.transformers import ZOTrainer

QUIET: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.05}


def model() -> nn.Module:
    return seeded(models.opt, 1)


def masked(seed: int | None = None) -> DataCollatorForLanguageModeling:
    words = WordLevel({"[PAD]": 0, "[MASK]": 1, **{f"w{i}": i for i in range(2, 32)}}, unk_token="[PAD]")
    known = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), mask_token="[MASK]", pad_token="[PAD]")
    return DataCollatorForLanguageModeling(known, mlm_probability=0.4, seed=seed)


def unlabelled(count: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in tokens(count)]


class Augmented(Dataset):
    """Examples that are changed at random whenever they are read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {name: value.clone() for name, value in tokens(8)[i].items()}
        row["input_ids"][random.randrange(8)] = int(np.random.randint(2, 32))
        row["input_ids"][int(torch.randint(8, ()))] = 2
        return row


class Stream(IterableDataset):
    """Without a length; what it draws for one example depends on those before."""

    def __init__(self, draws: bool):
        self.draws = draws

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        for i, row in enumerate(tokens(8)):
            if self.draws:
                row["input_ids"][int(torch.randint(8, ()))] = random.randrange(2, 32)
            if worker is None or i % worker.num_workers == worker.id:
                yield row


def noisy(rows: Any, generator: Any) -> Any:
    batch = default_data_collator(rows)
    at = int(torch.randint(8, (), generator=generator)) if isinstance(generator, torch.Generator) else (
        generator.randrange(8) if isinstance(generator, random.Random) else int(generator.integers(8))
        if isinstance(generator, np.random.Generator) else int(generator.randint(8))
    )  # fmt: skip
    batch["input_ids"][:, at] = 2
    return batch


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy, old": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}
# An epoch has four batches, and a run seven steps: one is resumed within the first epoch, at its end, and after it.
DATA: dict[str, Any] = {
    "a masking collator": lambda: (unlabelled(), {"data_collator": masked()}),
    "a masking collator, seeded": lambda: (unlabelled(), {"data_collator": masked(seed=5)}),
    "augmented": lambda: (Augmented(), {}),
    "accumulated": lambda: (Augmented(), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "a stream": lambda: (Stream(False), {}),
    "a stream that draws": lambda: (Stream(True), {}),
    "a stream of workers": lambda: (
        Stream(True),
        {"data_collator": masked(), "dataloader_num_workers": 2, "eval_strategy": "no"},
    ),
    "a sampler that draws": lambda: (
        [{**row, "length": 3 + i % 5} for i, row in enumerate(tokens(8))],
        BY_LENGTH,
    ),
    **{
        f"a generator of {kind}": lambda make=make: (tokens(8), {"data_collator": partial(noisy, generator=make())})
        for kind, make in GENERATORS.items()
    },
}


@pytest.mark.parametrize("kind", DATA)
def test_a_resumed_run_reads_what_the_run_read(kind: str, tmp_path: Path) -> None:
    """Though evaluations draw, too, and a resumed one has had others."""
    often = {**QUIET, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tokens(2), "max_steps": 7}
    data, options = DATA[kind]()
    whole = trained(tmp_path, model(), data, **{**often, **options})
    for step in (2, 4, 6) if "of" not in kind else (6,):
        data, options = DATA[kind]()
        torch.manual_seed(step)
        again = made(tmp_path, model(), data, **{**often, **options, "save_strategy": "no"})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(again) == losses(whole), step
        assert_same(weights(again.model), weights(whole.model))


class Forgetful(Stream):
    """It knows what it gave before, in an attribute that is neither a generator nor set by set_epoch."""

    def __init__(self) -> None:
        super().__init__(draws=False)
        self.times = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.times += 1
        for row in super().__iter__():
            yield {name: (value + self.times) % 32 for name, value in row.items()}


def test_other_batches_that_were_asked_for_are_no_other_data(tmp_path: Path) -> None:
    trained(tmp_path, model(), tokens(8), **QUIET, max_steps=7)
    for options in ({"per_device_train_batch_size": 4}, {"seed": 7}, {"max_steps": 9}):
        again = made(tmp_path, model(), tokens(8), **{**QUIET, "save_strategy": "no", "max_steps": 7, **options})
        with pytest.warns(UserWarning, match="the run had other options than were given now") as told:
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert not [w for w in told if "other batches" in str(w.message)]


def test_data_that_differ_are_noticed(tmp_path: Path) -> None:
    trained(tmp_path, model(), Forgetful(), **QUIET, max_steps=7)
    again = made(tmp_path, model(), Forgetful(), **{**QUIET, "save_strategy": "no"}, max_steps=7)
    with pytest.warns(UserWarning, match=r"the dataset gives other batches than it gave the run at the same place"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    shorter = made(tmp_path, model(), tokens(2), **{**QUIET, "save_strategy": "no"}, max_steps=7)
    with pytest.warns(UserWarning, match=r"the dataset gives other batches than it gave the run at the same place"):
        shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def squared(model: Any, inputs: Any, outputs: Any) -> Any:
    return outputs.logits.square().mean()


# What is changed: what the warning says, and what of the run tells which of both counts.
KEPT = "the run's are kept: "
TAKEN = "those given now are taken from here on: "
CHANGED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "learning_rate": ({"learning_rate": 0.02}, rf"{KEPT}learning_rate 0.05 \(now 0.02\)\.", lambda t: rate(t) == 0.05),
    "eps": ({"eps": 0.01}, rf"{KEPT}eps 0.001 \(now 0.01\)\.", lambda t: t.zo_optimizer.param_groups[0]["eps"] == 1e-3),
    "weight_decay": (
        {"weight_decay": 0.1},
        rf"{KEPT}weight_decay 0.0 \(now 0.1\)\.",
        lambda t: t.zo_optimizer.param_groups[0]["weight_decay"] == 0.0,
    ),
    "sparsity": (
        {"sparsity": 0.25},
        rf"{KEPT}sparsity 0.0 \(now 0.25\)\.",
        lambda t: t.zo_optimizer.trajectory.setups[-1][1].weights[0].threshold is None,
    ),
    "directions": (
        {"directions": 3},
        rf"{KEPT}directions 1 \(now 3\)\.",
        lambda t: len(t.zo_optimizer.trajectory[-1].losses) == 1,
    ),
    "zo_seed": ({"zo_seed": 7}, rf"{KEPT}zo_seed 42 \(now 7\)\.", lambda t: t.zo_optimizer.seed == 42),
    "seed": (
        {"seed": 7},
        rf"{KEPT}zo_seed 42 \(now 7\); {TAKEN}seed 42 \(now 7\)\.",
        lambda t: t.zo_optimizer.seed == 42,
    ),
    "perturb": (
        {"perturb": "in_forward"},
        rf"{TAKEN}perturb 'in_place' \(now 'in_forward'\)\.",
        lambda t: not t.zo_optimizer.trajectory.setups[-1][1].in_place,
    ),
    "lr_scheduler_type": (
        {"lr_scheduler_type": "linear"},
        rf"{TAKEN}lr_scheduler_type 'constant' \(now 'linear'\)\.",
        lambda t: [r.rates[0] for r in t.zo_optimizer.trajectory][2:] == pytest.approx([0.05, 0.05 / 4], rel=1e-6),
    ),
    "per_device_train_batch_size": (
        {"per_device_train_batch_size": 4},
        rf"{TAKEN}per_device_train_batch_size 2 \(now 4\)\.",
        lambda t: True,
    ),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2},
        rf"{TAKEN}gradient_accumulation_steps 1 \(now 2\)\.",
        lambda t: True,
    ),
    "max_steps": ({"max_steps": 5}, rf"{TAKEN}max_steps 4 \(now 5\)\.", lambda t: t.zo_optimizer.step_count == 5),
    "rounding": ({"rounding": "nearest"}, rf"{TAKEN}rounding 'auto' \(now 'nearest'\)\.", lambda t: True),
    "objective": (
        {"objective": squared},
        rf"{TAKEN}objective 'loss' \(now 'squared'\)\.",
        lambda t: losses(t)[-1][1] < 1,
    ),
}


# Of other methods, several at once.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str, Any]] = {
    "lezo": ({"drop": 0.5}, {"drop": 0.75}, r"drop 0.5 \(now 0.75\)\.", lambda optimizer: optimizer.drop == 0.5),
    "sparse-mezo": (
        {"sparsity": 0.5},
        {"sparsity": 0.9, "learning_rate": 0.01},
        r"learning_rate 0.05 \(now 0.01\), sparsity 0.5 \(now 0.9\)\.",
        lambda optimizer: optimizer.param_groups[0]["sparsity"] == 0.5,
    ),
    "mezo-svrg": (
        {"anchor_every": 3, "anchor_lr": 0.01},
        {"anchor_every": 5, "anchor_lr": 0.02, "anchor_examples": 4},
        rf"anchor_lr 0.01 \(now 0.02\), anchor_every 3 \(now 5\); {TAKEN}anchor_examples None \(now 4\)\.",
        lambda optimizer: (optimizer.anchor_every, optimizer.param_groups[0]["anchor_lr"]) == (3, 0.01),
    ),
}


@pytest.mark.parametrize("method", OTHERS)
def test_changed_options_of_other_methods_are_named(method: str, tmp_path: Path) -> None:
    first, changed, told, holds = OTHERS[method]
    common = {**QUIET, "method": method}
    trained(tmp_path, seeded(models.opt, 2), tokens(8), **common, **first)
    again = made(tmp_path, seeded(models.opt, 2), tokens(8), **{**common, **first, **changed, "save_strategy": "no"})
    with pytest.warns(UserWarning, match=KEPT + told):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert holds(again.zo_optimizer)


def rate(trainer: ZOTrainer) -> float:
    return trainer.zo_optimizer.trajectory[-1].rates[0]


@pytest.fixture(scope="module")
def at_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off after two of four steps."""
    folder = tmp_path_factory.mktemp("resumed")
    trained(folder, seeded(models.opt, 2), tokens(8), **QUIET)
    return folder / "checkpoint-2"


@pytest.mark.parametrize("option", CHANGED)
def test_changed_options_are_named(option: str, at_two: Path, tmp_path: Path) -> None:
    """All in one warning, with both values; and what it says counts does."""
    changed, told, holds = CHANGED[option]
    again = made(tmp_path, seeded(models.opt, 2), tokens(8), **{**QUIET, "save_strategy": "no", **changed})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint=str(at_two))
    (warning,) = (str(w.message) for w in caught if "the run had" in str(w.message))
    assert re.search(told, warning), warning
    assert holds(again)
