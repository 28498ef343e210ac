"""Take one step of the optimizer at a time, and time its parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.closures.losses import OutOfRange
from zo_kernels.finetune.config import Config
from zo_kernels.finetune.folders.metrics import Step
from zo_kernels.finetune.learner import Learner
from zo_kernels.spec import direction_seed

_ANCHOR_BATCHES = 2**19  # of `direction_seed`: no direction has this number


class Stepper:
    """Takes steps on random batches, beginning after the last step of the optimizer.

    The batches depend only on the seed of the run and the number of the step, so a resumed run sees the same batches.
    """

    def __init__(self, config: Config, learner: Learner, optimizer: zo.ZeroOrderOptimizer) -> None:
        self._config, self._learner, self._optimizer = config, learner, optimizer
        generator = torch.Generator().manual_seed(config.seed)
        self._batches = learner.train.endless(config.batch_size, generator, skip=optimizer.step_count)
        device = learner.device
        self._forwards, self._steps, self._assembly = _Stopwatch(device), _Stopwatch(device), _Stopwatch(device)
        self._rates = [
            {key: group[key] for key in ("lr", "anchor_lr") if group.get(key) is not None}
            for group in optimizer.param_groups
        ]

    def step(self, factor: float) -> Step:
        """Take one step, with every learning rate `factor` times its value at the start."""
        # torch's schedulers change one rate a group, but MeZO-SVRG has two.
        for group, rates in zip(self._optimizer.param_groups, self._rates, strict=True):
            group.update({key: rate * factor for key, rate in rates.items()})
        for watch in (self._forwards, self._steps, self._assembly):
            watch.seconds = 0.0
        (batch,) = self._draw(self._batches, 1)
        drawn_before = self._assembly.seconds
        with self._steps:
            loss = self._loss_of_step(batch)
        seconds = self._steps.seconds - (self._assembly.seconds - drawn_before)
        return Step(
            loss=loss,
            lr=self._optimizer.param_groups[0]["lr"],
            seconds=seconds,
            forward_seconds=self._forwards.seconds,
            pass_seconds=seconds - self._forwards.seconds,
            batch_seconds=self._assembly.seconds,
        )

    def _loss_of_step(self, batch: Any) -> float | None:
        step = self._optimizer.step_count
        closures = closures_of(self._config, self._learner, step, batch, self._loss, self._draw)
        try:
            return float(self._optimizer.step(*closures))
        except OutOfRange:
            return None

    def _loss(self, batch: Any) -> Tensor:
        with self._forwards:
            return self._learner.loss(batch)

    def _draw(self, batches: Iterator[Any], count: int) -> list[Any]:
        with self._assembly:
            return drawn(batches, count)


def drawn(batches: Iterator[Any], count: int) -> list[Any]:
    """The next batches."""
    return list(islice(batches, count))


def closures_of(
    config: Config,
    learner: Learner,
    step: int,
    batch: Any,
    loss: Callable[[Any], Tensor],
    draw: Callable[[Iterator[Any], int], list[Any]] = drawn,
) -> tuple[Callable[[], Tensor], ...]:
    """The closures of a step: the loss of its batch, and for MeZO-SVRG that of the many examples at an anchor.

    Args:
        step: how many steps were taken before. The examples at an anchor depend on it and on the seed alone.
        loss: of a batch.
        draw: takes batches out of an iterator; see `drawn`.
    """
    if (anchor := config.anchor) is None:
        return (lambda: loss(batch),)
    large: list[Any] = []

    def loss_of_large() -> Tensor:
        # Most steps never call this, so the batches are drawn at the first call and kept for the rest of the step.
        if not large:
            seed = direction_seed(config.seed, step, _ANCHOR_BATCHES) >> 1
            batches = learner.train.endless(config.batch_size, torch.Generator().manual_seed(seed))
            large.extend(draw(batches, math.ceil(anchor.examples / config.batch_size)))
        return torch.stack([loss(part) for part in large]).mean()

    return lambda: loss(batch), loss_of_large


class _Stopwatch:
    """Sums the seconds spent inside `with`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __enter__(self) -> None:
        self._wait()
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._start
