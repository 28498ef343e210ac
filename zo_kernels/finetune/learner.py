"""What a run trains, as the machinery of runs sees it: nothing here knows of classifiers or prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.finetune import run_folder
from zo_kernels.finetune.examples import Examples
from zo_kernels.finetune.results import Evaluation


class Predictor(ABC):
    """A model with everything that is needed to use it on text."""

    model: nn.Module
    tokenizer: Any
    names: tuple[str, ...]  # of the labels, as a person reads them
    max_tokens: int

    @abstractmethod
    def save_start(self, folder: Path) -> None:
        """Write what a run starts with and the pretrained model does not hold to `folder/start`."""

    def save(self, folder: Path) -> None:
        """Write all of it to `folder/model`, all or nothing; weights as safetensors in their own dtype."""
        with run_folder.whole_folder(folder / run_folder.MODEL) as target:
            self._write(target)

    @abstractmethod
    def _write(self, target: Path) -> None:
        """All of it to a folder."""


class Learner(ABC):
    """A predictor that is trained, the examples that it learns from, and what is measured on them."""

    predictor: Predictor
    train: Examples[Any]
    dev: Examples[Any]
    test: Examples[Any]
    device: torch.device

    @property
    def splits(self) -> dict[str, Examples[Any]]:
        """By name."""
        return {"train": self.train, "dev": self.dev, "test": self.test}

    def facts(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with its start, beside what every run has."""
        return {}

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training makes smaller: a scalar."""

    @abstractmethod
    def evaluate(self, examples: Examples[Any]) -> Evaluation:
        """On all examples of a split, without gradients."""
