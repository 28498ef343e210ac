"""Times of steps of LeZO and Sparse-MeZO beside dense ones, ours and published, in pairs of one run."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch

from ..bench.compare import Trial, Versus, compare
from ..bench.registry import Case, Row
from ..bench.timing import Call, Plan
from ..step.cases import StepMaker, unusable
from ..step.methods import MEZO, Method
from ..step.shapes import SHAPES, Batch
from .learning import WrongStep
from .tasks import device_of

AGAINST = OURS, PUBLISHED, PUBLISHED_DENSE = "MeZO", "published passes", "MeZO, published passes"
Setting = tuple[str, int, int]  # shape, examples, tokens
_CPU = (("opt-125m", 1, 32), ("minilm", 32, 34))
_CUDA = (("opt-1.3b", 1, 64), ("opt-1.3b", 16, 256))


def settings(options: Namespace) -> Sequence[Setting]:
    """Shapes with examples and tokens: where passes dominate first, then where forwards do."""
    if options.fast:
        return (("tiny", 1, 8), ("tiny", 4, 8))
    return _CUDA if device_of(options).type == "cuda" else _CPU


class StepTimes:
    """Measured when first asked for, and then remembered."""

    def __init__(self, options: Namespace):
        self._options = options
        self.rows = cache(self._rows)

    def _rows(self, method: Method, shape: str, examples: int, tokens: int, against: tuple[str, ...]) -> list[Row]:
        """A step of a method against ours of MeZO, its own published one, and MeZO's published one."""
        options, device = self._options, device_of(self._options)
        torch.set_num_threads(options.threads)
        dtype = torch.bfloat16 if SHAPES[shape].large and device.type == "cuda" else torch.float32
        task = SHAPES[shape].build(Batch(examples, tokens), device, dtype)
        make = StepMaker(task, method, device, options)
        # A model of its own: an optimizer whose weights another has changed takes fingerprints of all of them.
        dense = StepMaker(replace(task, model=copy.deepcopy(task.model)), MEZO, device, options)
        other = copy.deepcopy(task.model)  # the baselines replace the memory of the weights
        others: dict[str, Callable[[], Call]] = {
            OURS: lambda: dense.call(dense.first.run),
            PUBLISHED: lambda: make.call(make.baseline(other, True)),
            PUBLISHED_DENSE: lambda: dense.call(dense.baseline(other, True)),
        }
        elements = sum(p.numel() for p in task.model.parameters())
        versus = [Versus(name, others[name]()) for name in against]
        trial = Trial(make.call(make.first.run), make.first.check, versus, elements)
        facts = {"shape": shape, "batch": examples, "tokens": tokens, "elements": elements}
        facts |= {"dtype": str(dtype).removeprefix("torch.")}
        return [facts | row for row in compare(trial, Plan(options.rounds, options.seconds, second=True), device)]

    def shares(self, method: Method) -> dict[str, float]:
        """The time of a step in parts of MeZO's, "published" and "ours", at the first of the settings.

        Raises:
            WrongStep: one of the steps is not what it should be.
        """
        rows = {row.get("baseline"): row for row in self.rows(method, *settings(self._options)[0], AGAINST)}
        for row in rows.values():
            if not row["correct"]:
                raise WrongStep(f"its timed step: {row['wrong']}")
        return {
            "published": rows[PUBLISHED]["ratio"] / rows[PUBLISHED_DENSE]["ratio"],
            "ours": 1 / rows[OURS]["ratio"],
        }


def case(
    options: Namespace,
    times: StepTimes,
    name: str,
    facts: Row,
    method: Method,
    setting: Setting,
    against: tuple[str, ...] = AGAINST,
) -> Case:
    """Of steps alone."""
    device, (shape, examples, tokens) = device_of(options), setting
    facts = {
        **facts,
        "experiment": "step",
        "device": str(device),
        "backend": options.backend,
        "threads": options.threads if device.type == "cpu" else None,
    }
    name = f"{facts['claim']}/step/{shape}/{examples}x{tokens}{name}"
    return Case(name, facts, partial(times.rows, method, *setting, against), unusable(device, options.backend))


def cells(row: Row) -> dict[str, str]:
    return {
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        "forwards' share": f"{row['forwards_share']:.1%}",
        "its forwards' share": f"{row['baseline_forwards_share']:.1%}",
    }
