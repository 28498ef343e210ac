"""The same pass without zo_kernels: as MeZO publishes it, as well as eager PyTorch can, and by torch.compile.

`pass_(params, seed, factor, step, masks)` does p <- p + factor * step * m * z for each parameter, z from the seed:
normals, or random signs (`distribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Masks = Sequence[Tensor | None] | None  # a bool tensor or None for each parameter, or no masks at all
BaselinePass = Callable[[Sequence[Tensor], int, float, float, Masks], None]


def _masked(params: Sequence[Tensor], masks: Masks) -> Iterator[tuple[Tensor, Tensor | None]]:
    return zip(params, [None] * len(params) if masks is None else masks, strict=True)


def published_pass(
    params: Sequence[Tensor],
    seed: int,
    factor: float,
    step: float,
    masks: Masks = None,
    distribution: str = "normal",
) -> None:
    """MeZO's loop (princeton-nlp/MeZO, trainer.py), restated: a fresh z, and a temporary for each operation."""
    torch.manual_seed(seed)
    for p, mask in _masked(params, masks):
        if distribution == "normal":
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, device=p.device, dtype=p.dtype)
        else:
            z = 2 * torch.randint(0, 2, p.shape, device=p.device, dtype=p.dtype) - 1
        if mask is not None:
            z = z * mask
        p.data = p.data + factor * z * step


class EagerPass:
    """As few operations and as little memory as eager PyTorch needs: one buffer, reused, and two passes over it.

    Signs take two more: a Bernoulli's zeros and ones become them by a product and a difference.
    """

    def __init__(self, params: Sequence[Tensor], distribution: str = "normal"):
        self._distribution = distribution
        largest = max(params, key=Tensor.numel)
        self._buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=largest.device)
        self._generator = torch.Generator(largest.device)

    def __call__(self, params: Sequence[Tensor], seed: int, factor: float, step: float, masks: Masks = None) -> None:
        self._generator.manual_seed(seed)
        for p, mask in _masked(params, masks):
            z = self._buffer[: p.numel()].view(p.shape)
            if self._distribution == "normal":
                z.normal_(generator=self._generator)
            else:
                z.bernoulli_(generator=self._generator).mul_(2).sub_(1)
            if mask is not None:
                z.mul_(mask)
            p.add_(z, alpha=factor * step)


def compiled_pass() -> Callable[[Tensor, float], Tensor]:
    """torch.compile of the whole pass, for the one size it is called with.

    It cannot draw the same z twice without keeping the generator's state.
    """
    torch.compiler.reset()  # else the kernels of earlier sizes count against the limit of recompilations

    def add_noise(w: Tensor, scale: float) -> Tensor:
        return w.add_(torch.randn_like(w), alpha=scale)

    return torch.compile(add_noise, dynamic=False)
