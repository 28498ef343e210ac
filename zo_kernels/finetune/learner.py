"""What a run trains, as the machinery of runs sees it: nothing here knows of classifiers or prompts."""

from __future__ import annotations

import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_kernels.finetune.data.examples import Examples
from zo_kernels.finetune.folders import run_folder
from zo_kernels.finetune.folders.metrics import Evaluation


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


def no_bar(count: int) -> None:
    """For an evaluation that nobody watches."""


def checked_rows(rows: Iterable[Any], each: str) -> list[Any]:
    """What a predictor is asked for, as a list.

    Raises TypeError for one row alone, which is taken for many by Python, and for what has no order or cannot be gone
    through.
    """
    if isinstance(rows, str | bytes | Mapping):
        raise TypeError(
            f"predict: expected a list of {each}, got {reprlib.repr(rows)}: for one of them, predict([it])[0]"
        )
    if isinstance(rows, set | frozenset) or not isinstance(rows, Iterable):
        raise TypeError(f"predict: expected a list of {each}, got a {type(rows).__name__}")
    return list(rows)


def warn_of_cut(cut: int, of: int, max_tokens: int) -> None:
    """That texts to be predicted were longer than the model was trained on."""
    if cut:
        warnings.warn(
            f"predict: {cut} of {of} texts are longer than {max_tokens} tokens and were cut (--max-tokens of the run)",
            stacklevel=4,  # predict, and torch.no_grad around it
        )


class Learner(ABC):
    """A predictor that is trained, the examples that it learns from, and what is measured on them."""

    predictor: Predictor
    train: Examples[Any]
    dev: Examples[Any]
    test: Examples[Any]
    device: torch.device
    notes: tuple[str, ...]  # what a person must know of the data

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
    def evaluate(self, examples: Examples[Any], done: Callable[[int], object] = no_bar) -> Evaluation:
        """On all examples of a split, without gradients; `done` is called with how many more have been evaluated."""
