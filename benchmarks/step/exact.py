"""A step of SPSA to the last bit: what modules must run on, and what must be left, by the noise's specification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels.spec import fma, round_stochastic

from .check import Check, Walk, Windows, WrongWeights


def wrong_step(
    optimizer: zo.ZeroOrderOptimizer,
    model: nn.Module,
    loss: Callable[[], Tensor],
    mask: Callable[[Windows, Tensor], Callable[[], Tensor]] | None = None,
) -> str | None:
    """Take a step of MeZO, and say where it leaves the specification's bits.

    `mask`, given the weights before the step, gives what tells after the first closure call which of them take part, as
    ones and zeros.
    """
    windows = Windows(optimizer, model)
    theta = windows.read()
    walk = exact_spsa(windows, theta, None if mask is None else mask(windows, theta))
    try:
        check = Check(windows, walk, loss, torch.zeros_like(theta))
        optimizer.step(check.closure)
        check.finish()
    except WrongWeights as error:
        return str(error)
    return None


def exact_spsa(windows: Windows, theta: Tensor, mask: Callable[[], Tensor] | None = None) -> Walk:
    """A step with one direction. The mask, told as ones and zeros, is asked for at the first closure call."""
    opt = windows.optimizer
    (group,), dtype = opt.param_groups, windows.dtype
    eps, lr = group["eps"], group["lr"]
    z = windows.z(0).float()
    stochastic = dtype != torch.float32 and opt.rounding != "nearest"
    rho = windows.rounding_bits(0) if stochastic else None

    def move(w: Tensor, scale: float) -> Tensor:
        """round(w + scale z)."""
        t = fma(z, scale, w.float())
        moved = (t.to(dtype) if rho is None else round_stochastic(t, rho, dtype)).double()
        return moved if kept is None else torch.where(kept != 0, moved, w)

    kept = None if mask is None else mask()
    in_place = opt.perturb == "in_place"
    here = move(theta, eps)
    above = yield here
    here = move(here, -2 * eps) if in_place else move(theta, -eps)
    below = yield here
    update = -lr * ((above - below) / (2 * eps))
    return move(here, update + eps) if in_place else move(theta, update)
