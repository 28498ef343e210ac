"""Find the learning rate of a run, for `--lr auto`: its first steps, at several rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.runs.job import Job, optimizer_of
from zo_kernels.finetune.runs.steps import closures_of

# A long run can afford to look farther: with a hundredth of its steps for each of some five rates, at 5 % of its price.
_SHARE, _USUAL_STEPS, _MOST_STEPS = 100, 40, 100


def find(job: Job, done: Callable[[], object]) -> zo.FoundLR:
    """Find a rate for the weights as they are, which are put back. After each forward `done` is called.

    Raises ValueError as `zo_kernels.find_lr` does.
    """
    config, learner = job.config, job.learner
    make, options = optimizer_of(config)

    def loss(batch: Any) -> Tensor:
        result = learner.loss(batch)
        done()
        return result

    def closures() -> Iterator[tuple[Callable[[], Tensor], ...]]:
        generator = torch.Generator().manual_seed(config.seed)
        for step, batch in enumerate(learner.train.endless(config.batch_size, generator)):
            yield closures_of(config, learner, step, batch, loss)

    steps = min(config.steps // _SHARE, _MOST_STEPS)
    more = {"steps": steps} if steps > _USUAL_STEPS else {}
    return zo.find_lr(learner.predictor.model, closures, optimizer=make, **more, **options)


def forwards_of_run(config: Config) -> float:
    """How often the steps of a run call their closures."""
    assert config.directions is not None
    each = config.directions + 1 if config.estimator == "one_sided" else 2 * config.directions
    between = 0.0 if config.anchor is None else 1 - 1 / config.anchor.every  # these evaluate two estimates
    return config.steps * each * (1 + between)


def as_record(found: zo.FoundLR) -> dict[str, Any]:
    """The record in the metrics."""
    tried = [{"lr": each.lr, "losses": each.losses, "gain": each.gain} for each in found.tried]
    told = {"lr": found.lr, "learned": found.learned, "forwards": found.forwards}
    return {"step": 0, **told, "baseline": found.baseline, "tried": tried}
