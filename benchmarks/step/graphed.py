"""Steps that are captured in a CUDA graph, checked before anything is timed: what is repeated must be a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..bench.timing import Watch
from . import check as step_check
from .check import Windows, WrongWeights
from .exact import exact_spsa
from .methods import EPS, LR, Method, Ours

_WARMUP = 3


def graphed(
    method: Method, model: nn.Module, loss: Callable[[], Tensor], backend: str | None, device: torch.device
) -> Callable[[], object]:
    """What repeats a step of the method, which must be one of SPSA without blocks left out.

    Args:
        loss: of the model; what watches it would be captured too.

    Raises:
        WrongWeights: a repeated step leaves other weights than the method's formula.
    """
    ours = Ours(method, model, loss, Watch(device), backend)
    # transformers may take another path when it is captured; what it returns there is what the step is checked with.
    step = ours.optimizer.graphed(loss, warmup=_WARMUP, same_bits=False)
    for _ in range(_WARMUP + 1):
        step()
    windows = Windows(ours.optimizer, model)
    theta = windows.read()
    mask = torch.ones_like(theta)
    if method.sparsity:  # by thresholds that are older than the warm-up's steps
        mask = (theta.abs() <= windows.spread(windows.thresholds)).double()
    exact = method.exact(windows.dtype)
    walk = exact_spsa(windows, theta, lambda: mask) if exact else step_check.spsa(windows, theta, lambda: mask, EPS, LR)
    next(walk)
    step()
    (gradient,) = ours.optimizer.projected_gradients
    walk.send(gradient * 2 * EPS)  # a pair of losses that has this gradient
    try:
        walk.send(0.0)
    except StopIteration as end:
        limit = step_check.rounding(theta, EPS, windows.dtype)
        if exact:
            limit = torch.zeros_like(limit)
        off = ~((windows.read() - end.value).abs() <= limit)
        if off.any():
            first = windows.name_of(int(off.nonzero()[0]))
            raise WrongWeights(
                f"a step repeated by its graph leaves {int(off.sum())} weights off, first in {first}"
            ) from None
    return step
