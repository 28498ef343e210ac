"""The protocol of what a run trains. `classifier/` and `prompts/` implement it; `runs/` uses it."""

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
    """A model with its tokenizer and labels, ready for texts."""

    model: nn.Module
    tokenizer: Any
    names: tuple[str, ...]  # of the labels, as users read them
    max_tokens: int

    @abstractmethod
    def save_start(self, folder: Path) -> None:
        """Write to `folder/start` what a run starts with beyond the pretrained model: head and labels."""

    def save(self, folder: Path) -> None:
        """Write the model, its tokenizer and labels to `folder/model`, all or nothing. Weights keep their dtype."""
        with run_folder.whole_folder(folder / run_folder.MODEL) as target:
            self._write(target)

    @abstractmethod
    def _write(self, target: Path) -> None:
        """Write model, tokenizer and labels to a folder."""


def no_bar(count: int) -> None:
    """Show no progress bar."""


def checked_rows(rows: Iterable[Any], each: str) -> list[Any]:
    """The rows to predict, as a list.

    Raises TypeError for a single row, which Python could iterate over by mistake, for a set, which has no order, and
    for anything that is not iterable.
    """
    if isinstance(rows, str | bytes | Mapping):
        raise TypeError(
            f"predict: expected a list of {each}, got {reprlib.repr(rows)}: for a single one, use predict([it])[0]"
        )
    if isinstance(rows, set | frozenset) or not isinstance(rows, Iterable):
        raise TypeError(f"predict: expected a list of {each}, got a {type(rows).__name__}")
    return list(rows)


def warn_of_cut(cut: int, of: int, max_tokens: int) -> None:
    """Warn that texts were longer than those the model was trained on."""
    if cut:
        warnings.warn(
            f"predict: {cut} of {of} texts are longer than {max_tokens} tokens, the --max-tokens of the run, and were "
            "cut",
            stacklevel=4,  # predict, and torch.no_grad around it
        )


class Learner(ABC):
    """A predictor in training: its examples, its loss, its evaluation."""

    predictor: Predictor
    train: Examples[Any]
    dev: Examples[Any]
    test: Examples[Any]
    device: torch.device
    notes: tuple[str, ...]  # on the data, for the user

    @property
    def splits(self) -> dict[str, Examples[Any]]:
        """Name -> split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}

    def facts(self) -> dict[str, Any]:
        """Facts recorded at the start of a run, beyond those of every run. A resumed run must have the same."""
        return {}

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The scalar that training minimises."""

    @abstractmethod
    def evaluate(self, examples: Examples[Any], done: Callable[[int], object] = no_bar) -> Evaluation:
        """Evaluate all examples of a split. After each batch `done` is called with the number of its examples."""
