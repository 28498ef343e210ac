"""The same pass without zo_kernels: as MeZO publishes it, as well as eager PyTorch can, and by torch.compile.

`pass_(params, seed, factor, step, masks)` does p <- p + factor * step * m * z for each parameter, z from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class BaselinePass(Protocol):
    """A pass over parameters; `masks` holds a bool tensor or None for each, and may itself be None."""

    def __call__(
        self,
        params: Sequence[Tensor],
        seed: int,
        factor: float,
        step: float,
        masks: Sequence[Tensor | None] | None = None,
    ) -> None: ...


def published_pass(
    params: Sequence[Tensor],
    seed: int,
    factor: float,
    step: float,
    masks: Sequence[Tensor | None] | None = None,
) -> None:
    """MeZO's loop (princeton-nlp/MeZO, trainer.py), restated: a fresh z, and a temporary for each operation."""
    torch.manual_seed(seed)
    for i, p in enumerate(params):
        z = torch.normal(mean=0.0, std=1.0, size=p.shape, device=p.device, dtype=p.dtype)
        mask = masks[i] if masks is not None else None
        if mask is not None:
            z = z * mask
        p.data = p.data + factor * z * step


class EagerPass:
    """As few operations and as little memory as eager PyTorch needs: one buffer, reused, and two passes over it."""

    def __init__(self, params: Sequence[Tensor]):
        largest = max(params, key=Tensor.numel)
        self._buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=largest.device)
        self._generator = torch.Generator(largest.device)

    def __call__(
        self,
        params: Sequence[Tensor],
        seed: int,
        factor: float,
        step: float,
        masks: Sequence[Tensor | None] | None = None,
    ) -> None:
        self._generator.manual_seed(seed)
        for i, p in enumerate(params):
            z = self._buffer[: p.numel()].view(p.shape).normal_(generator=self._generator)
            mask = masks[i] if masks is not None else None
            if mask is not None:
                z.mul_(mask)
            p.add_(z, alpha=factor * step)


def compiled_pass() -> Callable[[Tensor, float], Tensor]:
    """torch.compile of the whole pass. It cannot draw the same z twice without keeping the generator's state.

    It is compiled for the one size that it is called with.
    """
    torch.compiler.reset()  # else the kernels of earlier sizes count against the limit of recompilations

    def add_noise(w: Tensor, scale: float) -> Tensor:
        return w.add_(torch.randn_like(w), alpha=scale)

    return torch.compile(add_noise, dynamic=False)
