"""What a resumed run reads is what the run would have read; what it was given anew is named."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from tiny_trainer import assert_same, losses, made, seeded, tokens, trained, weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, default_data_collator

import zo_kernels as zo
from zo_kernels.integrations.transformers import ZOTrainer, checkpoints
from zo_kernels.integrations.transformers.draws import own_generators, set_own_generators

QUIET: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "learning_rate": 0.05}


def model() -> nn.Module:
    return seeded(models.opt, 1)


def masked(seed: int | None = None) -> DataCollatorForLanguageModeling:
    words = WordLevel({"[PAD]": 0, "[MASK]": 1, **{f"w{i}": i for i in range(2, 32)}}, unk_token="[PAD]")
    known = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), mask_token="[MASK]", pad_token="[PAD]")
    return DataCollatorForLanguageModeling(known, mlm_probability=0.4, seed=seed)


def unlabelled(count: int = 10) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in tokens(count)]


class Augmented(Dataset):
    """Examples that are changed at random whenever they are read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {name: value.clone() for name, value in tokens(10)[i].items()}
        row["input_ids"][random.randrange(8)] = int(np.random.randint(2, 32))
        row["input_ids"][int(torch.randint(8, ()))] = 2
        return row


class Stream(IterableDataset):
    """Without a length; what it draws for one example depends on those before."""

    def __init__(self, draws: bool):
        self.draws = draws

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        for i, row in enumerate(tokens(10)):
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
# An epoch has five batches, and a run eight steps: one is resumed within the first epoch, at its end, and after it.
DATA: dict[str, Any] = {
    "a masking collator": lambda: (unlabelled(), {"data_collator": masked()}),
    "a masking collator, seeded": lambda: (unlabelled(), {"data_collator": masked(seed=5)}),
    "a masking collator, in workers": lambda: (
        unlabelled(),
        {"data_collator": masked(), "dataloader_num_workers": 2},
    ),
    "augmented": lambda: (Augmented(), {}),
    "accumulated": lambda: (Augmented(), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "a stream": lambda: (Stream(False), {}),
    "a stream that draws": lambda: (Stream(True), {}),
    "a stream in workers": lambda: (Stream(True), {"dataloader_num_workers": 2}),
    "a sampler that draws": lambda: (
        [{**row, "length": 3 + i % 5} for i, row in enumerate(tokens(10))],
        {"train_sampling_strategy": "group_by_length"},
    ),
    **{
        f"a generator of {kind}": lambda make=make: (tokens(10), {"data_collator": partial(noisy, generator=make())})
        for kind, make in GENERATORS.items()
    },
}


@pytest.mark.parametrize("kind", DATA)
def test_a_resumed_run_reads_what_the_run_read(kind: str, tmp_path: Path) -> None:
    """Though evaluations draw, too, and a resumed one has had others."""
    often = {**QUIET, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tokens(2), "max_steps": 8}
    data, options = DATA[kind]()
    whole = trained(tmp_path, model(), data, **often, **options)
    for step in (3, 5, 7) if "of" not in kind else (7,):
        data, options = DATA[kind]()
        torch.manual_seed(step)
        again = made(tmp_path, model(), data, **{**often, **options, "save_strategy": "no"})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert losses(again) == losses(whole), step
        assert_same(weights(again.model), weights(whole.model))
