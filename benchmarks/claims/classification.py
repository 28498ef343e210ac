"""Classifying texts with a pretrained encoder: the demo's docstrings, or questions (TREC)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zo_kernels.finetune.config import Config
from zo_kernels.finetune.runs.train import evaluate

from ..exactness.demo_task import DemoTask, demo_task


class ClassificationTask:
    """Each seed has its own split, its own examples that the head is made from, and its own batches.

    Args:
        threads: for PyTorch.
        options: of `zo-finetune`: data, shots, batch_size, ...
    """

    def __init__(self, threads: int, **options: Any):
        self._task = cache(lambda seed: demo_task(Config(seed=seed, threads=threads, **options)))
        self._of: dict[nn.Module, DemoTask] = {}

    def model(self, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        if dtype != torch.float32:
            raise ValueError(f"dtype: expected torch.float32, got {dtype}")
        task = self._task(seed)
        model = copy.deepcopy(task.classifier)
        self._of = {model: task}  # of the run at hand alone
        return model

    def closures(self, model: nn.Module, seed: int) -> Iterator[Callable[[], Tensor]]:
        for batch in self._task(seed).batches():

            def loss(batch: Any = batch) -> Tensor:
                return F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)

            yield loss

    def dev_loss(self, model: nn.Module) -> float:
        return evaluate(model, self._of[model].dev).loss

    def test(self, model: nn.Module) -> dict[str, float]:
        result = evaluate(model, self._of[model].test)
        return {"test_loss": result.loss, "test_accuracy": result.accuracy}
