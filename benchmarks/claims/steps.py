"""Times of steps of MeZO, LeZO and Sparse-MeZO beside published ones, in pairs of one run."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch

import zo_kernels as zo

from ..bench.compare import Versus, compare
from ..bench.registry import Case, Row
from ..bench.timing import Call, Plan
from ..step.cases import StepMaker, unusable
from ..step.methods import MEZO, Method
from ..step.shapes import SHAPES, Batch, device_of

AGAINST = OURS, PUBLISHED, PUBLISHED_DENSE = "MeZO", "published passes", "MeZO, published passes"
DROPS = (0.25, 0.5, 0.75)
SPARSE = Method(zo.SparseMeZO, sparsity=0.75)
Setting = tuple[str, int, int]  # shape, examples, tokens
# The tokens grow: passes dominate first, then forwards do.
_MEZO = {
    "fast": (("tiny", 1, 8), ("tiny", 4, 8)),
    "cpu": tuple(("opt-125m", *batch) for batch in ((1, 16), (1, 64), (4, 64), (8, 128))),
    "cuda": tuple(("opt-1.3b", *batch) for batch in ((1, 64), (4, 64), (16, 64), (1, 256), (4, 256), (16, 256))),
}
_OTHERS = {
    "fast": _MEZO["fast"],
    "cpu": (("opt-125m", 1, 32), ("minilm", 32, 34)),
    "cuda": (("opt-1.3b", 1, 64), ("opt-1.3b", 16, 256)),
}


def lezo(drop: float) -> Method:
    return Method(zo.LeZO, drop=drop)


class StepTimes:
    """Measured when first asked for, and then remembered."""

    def __init__(self, options: Namespace):
        self._options, self._device = options, device_of(options)
        self._others: Sequence[Setting] = _OTHERS["fast" if options.fast else self._device.type]
        self.rows = cache(self._rows)

    def cases(self) -> Iterator[Case]:
        for setting in _MEZO["fast" if self._options.fast else self._device.type]:
            yield self._case("perturbation-dominates", "", {}, MEZO, setting, (PUBLISHED,))
        for setting in self._others:
            for drop in DROPS:
                yield self._case("lezo", f"/drop-{drop:g}", {"drop": drop}, lezo(drop), setting)
        for setting in self._others:
            yield self._case("sparse-mezo", "", {"sparsity": SPARSE.sparsity}, SPARSE, setting)

    def _case(
        self, claim: str, name: str, own: Row, method: Method, setting: Setting, against: tuple[str, ...] = AGAINST
    ) -> Case:
        options, (shape, examples, tokens) = self._options, setting
        facts = {"claim": claim, **own, "experiment": "step", "device": str(self._device), "backend": options.backend}
        facts["threads"] = options.threads if self._device.type == "cpu" else None
        measure = partial(self.rows, method, setting, against)
        skipped = unusable(self._device, options.backend)
        return Case(f"{claim}/step/{shape}/{examples}x{tokens}{name}", facts, measure, skipped)

    def _rows(self, method: Method, setting: Setting, against: tuple[str, ...]) -> list[Row]:
        """A step of a method against our MeZO's, its own published one, and MeZO's published one."""
        options, device, (shape, examples, tokens) = self._options, self._device, setting
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
        trial = make.trial(Versus(name, others[name]()) for name in against)
        facts = {"shape": shape, "batch": examples, "tokens": tokens, "elements": trial.elements}
        facts["dtype"] = str(dtype).removeprefix("torch.")
        return [facts | row for row in compare(trial, Plan(options.rounds, options.seconds, second=True), device)]

    def shares(self, method: Method) -> dict[str, float]:
        """The time of a step in parts of MeZO's, "published" and "ours", at the first of the settings."""
        ratios = {row["baseline"]: row["ratio"] for row in self.rows(method, self._others[0], AGAINST)}
        return {"published": ratios[PUBLISHED] / ratios[PUBLISHED_DENSE], "ours": 1 / ratios[OURS]}
