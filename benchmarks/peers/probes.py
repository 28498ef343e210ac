"""Is it a step of SPSA? Told from outside: by the weights that losses are evaluated at, and those after the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .peer import Loss, Settings, Step

_WINDOW = 1 << 16  # elements of each parameter that are looked at
_SIGMAS = 6.0
_ULP = 2.0**-23  # of float32, for a number of size 1
_ULPS = 8  # that passes over a weight may round by, together
_SLOPE = 1e-3  # relative error of the update's length: losses are float32


class Windows:
    """The first elements of each parameter, copied as one float64 vector."""

    def __init__(self, model: nn.Module):
        self.names = [name for name, _ in model.named_parameters()]
        self.params = list(model.parameters())

    def read(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1)[:_WINDOW].double() for p in self.params])

    def split(self, read: Tensor) -> list[Tensor]:
        return list(read.split([min(p.numel(), _WINDOW) for p in self.params]))


@torch.no_grad()
def wrong_step(step: Step, loss: Loss, settings: Settings) -> str | None:
    """Take a step, and say where it is not θ <- θ - lr g z, g = (L(θ + ε z) - L(θ - ε z)) / 2ε, with z of N(0, I).

    z is what the first two evaluations of the loss differ by.
    """
    windows = Windows(loss.model)
    theta = windows.read()
    seen: list[Tensor] = []
    losses: list[float] = []

    def look(value: Tensor) -> None:
        losses.append(float(value))
        if len(seen) < 2:
            seen.append(windows.read())

    loss.observer = look
    try:
        step()
    finally:
        loss.observer = None
    if len(seen) < 2:
        return f"a step evaluates the loss {len(seen)} times, expected twice"
    return _wrong(windows, theta, seen, losses, settings)


def _wrong(windows: Windows, theta: Tensor, seen: list[Tensor], losses: list[float], settings: Settings) -> str | None:
    eps, lr = settings.eps, settings.lr
    z = (seen[0] - seen[1]) / (2 * eps)
    for name, part in zip(windows.names, windows.split(z), strict=True):
        if not part.any():
            return f"{name} is not perturbed"
    if wrong := _not_normal(z, theta, eps):
        return wrong
    rounding = _ULPS * _ULP * (theta.abs() + eps * z.abs())
    if (off := (seen[0] + seen[1]) / 2 - theta).abs().gt(rounding).any():
        return f"the two losses are not evaluated at θ ± ε z, but around weights that are {off.abs().max():.1e} off θ"
    if losses[0] == losses[1]:
        return "the losses at θ ± ε z do not differ"
    g = (losses[0] - losses[1]) / (2 * eps)
    change = windows.read() - theta
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


def alike(model: nn.Module, change: Tensor) -> bool:
    """Whether two parameters of the same shape were changed along the same noise; `change` is as `Windows` reads it."""
    last: dict[torch.Size, Tensor] = {}
    windows = Windows(model)
    for p, part in zip(windows.params, windows.split(change), strict=True):
        before = last.get(p.shape)
        if before is not None and part.numel() > 8:
            correlation = (part * before).sum() / (part.norm() * before.norm())
            if correlation.abs() > 0.9:
                return True
        last[p.shape] = part
    return False
