"""Times of steps of LeZO and Sparse-MeZO beside dense ones, ours and published, in pairs of one run."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from ..cases_step import StepMaker
from ..compare import Trial, Versus, compare
from ..registry import Row
from ..shapes import SHAPES, Batch
from ..step_methods import MEZO, Method
from ..timing import Plan
from .tasks import device_of

OURS, PUBLISHED, PUBLISHED_DENSE = "MeZO", "published passes", "MeZO, published passes"
_CPU = (("opt-125m", 1, 32), ("minilm", 32, 34))
_CUDA = (("opt-1.3b", 1, 64), ("opt-1.3b", 16, 256))


def settings(options: Namespace) -> Sequence[tuple[str, int, int]]:
    """Shapes with examples and tokens: where passes dominate first, then where forwards do."""
    if options.fast:
        return (("tiny", 1, 8), ("tiny", 4, 8))
    return _CUDA if device_of(options).type == "cuda" else _CPU


class StepTimes:
    """Measured when first asked for, and then remembered."""

    def __init__(self, options: Namespace):
        self._options = options
        self.rows = cache(self._rows)

    def _rows(self, method: Method, shape: str, examples: int, tokens: int) -> list[Row]:
        """A step of a method against ours of MeZO, its own published one, and MeZO's published one."""
        options, device = self._options, device_of(self._options)
        torch.set_num_threads(options.threads)
        dtype = torch.bfloat16 if SHAPES[shape].large and device.type == "cuda" else torch.float32
        task = SHAPES[shape].build(Batch(examples, tokens), device, dtype)
        make = StepMaker(task, method, device, options)
        other = copy.deepcopy(task.model)  # the baselines replace the memory of the weights
        dense = StepMaker(task, MEZO, device, options)
        versus = [
            Versus(OURS, dense.call(dense.first.run)),
            Versus(PUBLISHED, make.call(make.baseline(other, True))),
            Versus(PUBLISHED_DENSE, dense.call(dense.baseline(other, True))),
        ]
        elements = sum(p.numel() for p in task.model.parameters())
        trial = Trial(make.call(make.first.run), make.first.check, versus, elements)
        facts = {"shape": shape, "batch": examples, "tokens": tokens, "elements": elements}
        return [facts | row for row in compare(trial, Plan(options.rounds, options.seconds / 2), device)]

    def seconds(self, method: Method, shape: str, examples: int, tokens: int) -> dict[str, float]:
        """Of a step: of the method under "ours" and "published", dense under "ours MeZO" and "published MeZO"."""
        rows = {row["baseline"]: row for row in self.rows(method, shape, examples, tokens) if row["correct"]}
        own = rows[OURS]["seconds_median"]
        return {
            "ours": own,
            "ours MeZO": own * rows[OURS]["ratio"],
            "published": own * rows[PUBLISHED]["ratio"],
            "published MeZO": own * rows[PUBLISHED_DENSE]["ratio"],
        }


def measure(times: StepTimes, method: Method, setting: tuple[str, int, int]) -> Callable[[], list[Row]]:
    return partial(times.rows, method, *setting)


def cells(row: Row) -> dict[str, str]:
    return {
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        "forwards' share": f"{row['forwards_share']:.1%}",
        "its forwards' share": f"{row['baseline_forwards_share']:.1%}",
    }
