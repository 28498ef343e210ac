"""Is it a step of SPSA? Told from outside: by the weights that losses are evaluated at, and those after the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bench.timing import Watch
from ..step.shapes import Task

Step = Callable[[], object]
_WINDOW = 1 << 16  # elements of each parameter that are looked at
_SIGMAS = 6.0
_ULP = 2.0**-23  # of float32, for a number of size 1
_ULPS = 8  # that passes over a weight may round by, together
_SLOPE = 1e-3  # relative error of the update's length: losses are float32


@dataclass(frozen=True)
class Settings:
    """What all peers are given alike."""

    lr: float
    eps: float
    seed: int


class Loss:
    """The closure that a peer evaluates.

    Args:
        task: whose loss.
        model: the task's, or a copy.
        watch: notes the calls as "forwards".

    Attributes:
        observer: is shown each value while the weights are as the peer has put them.
    """

    def __init__(self, task: Task, model: nn.Module, watch: Watch):
        self._task, self.model, self._watch = task, model, watch
        self.observer: Callable[[Tensor], None] | None = None

    def __call__(self) -> Tensor:
        with self._watch.part("forwards"):
            loss = self._task.loss(self.model)
        if self.observer is not None:
            self.observer(loss)
        return loss


def windows(model: nn.Module) -> list[Tensor]:
    """The first elements of each parameter, copied, float64."""
    return [p.detach().reshape(-1)[:_WINDOW].double() for p in model.parameters()]


@torch.no_grad()
def wrong_step(step: Step, loss: Loss, settings: Settings) -> str | None:
    """Take a step, and say how it differs from θ <- θ - lr g z, g = (L(θ + ε z) - L(θ - ε z)) / 2ε, z of N(0, I).

    z is what the first two evaluations of the loss differ by.
    """
    theta = torch.cat(windows(loss.model))
    seen: list[list[Tensor]] = []
    losses: list[float] = []

    def look(value: Tensor) -> None:
        losses.append(float(value))
        if len(seen) < 2:
            seen.append(windows(loss.model))

    loss.observer = look
    try:
        step()
    finally:
        loss.observer = None
    if len(seen) < 2:
        return f"a step evaluates the loss {len(seen)} times, expected twice"
    eps, lr = settings.eps, settings.lr
    for (name, _), above, below in zip(loss.model.named_parameters(), *seen, strict=True):
        if torch.equal(above, below):
            return f"{name} is not perturbed"
    above, below = map(torch.cat, seen)
    z = (above - below) / (2 * eps)
    if wrong := _not_normal(z, theta, eps):
        return wrong
    rounding = _ULPS * _ULP * (theta.abs() + eps * z.abs())
    if (off := (above + below) / 2 - theta).abs().gt(rounding).any():
        return f"the two losses are not evaluated at θ ± ε z, but around weights that are {off.abs().max():.1e} off θ"
    if losses[0] == losses[1]:
        return "the losses at θ ± ε z do not differ"
    g = (losses[0] - losses[1]) / (2 * eps)
    change = torch.cat(windows(loss.model)) - theta
    if not torch.stack([z, change]).isfinite().all():
        return "weights become NaN or infinite"
    slope = ((change * z).sum() / z.square().sum()).item()
    if abs(slope + lr * g) > _SLOPE * abs(lr * g) + _ULP * rounding.mean().item():
        return f"the step is {slope:.6e} z, expected {-lr * g:.6e} z"
    if (off := (change - slope * z).abs() - rounding - _ULPS * _ULP * change.abs()).gt(0).any():
        return f"the step leaves the direction z, or the weights are not restored: {off.max():.1e} off"
    return None


def _not_normal(z: Tensor, theta: Tensor, eps: float) -> str | None:
    """Whether the mean or the standard deviation is not that of N(0, 1), by more than chance and rounding."""
    n = z.numel()
    rounded = _ULP * theta.abs().mean().item() / eps
    for what, value, expected, sigma in (
        ("mean", z.mean().item(), 0.0, 1 / math.sqrt(n)),
        ("standard deviation", z.std().item(), 1.0, 1 / math.sqrt(2 * n)),
    ):
        if abs(value - expected) > _SIGMAS * sigma + rounded:
            return f"the noise has a {what} of {value:.5f}, expected {expected:g}"
    return None


def noise_repeats(before: nn.Module, after: nn.Module) -> bool:
    """Whether a step changed two successive parameters of the same shape along the same noise."""
    last: dict[torch.Size, Tensor] = {}
    for p, x, y in zip(after.parameters(), windows(before), windows(after), strict=True):
        change = y - x
        other = last.get(p.shape)
        comparable = other is not None and len(change) > 8
        if comparable and torch.cosine_similarity(change, other, dim=0, eps=0.0).abs() > 0.9:
            return True
        last[p.shape] = change
    return False
