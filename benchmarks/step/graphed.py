"""Steps that are captured in a CUDA graph, checked before anything is timed: what is repeated must be a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..bench.registry import Wrong
from ..bench.timing import Watch
from .check import Windows
from .exact import spsa
from .methods import Method, Ours

_WARMUP = 3


def graphed(
    method: Method, model: nn.Module, loss: Callable[[], Tensor], backend: str | None, device: torch.device
) -> Callable[[], object]:
    """Capture a step of the method in a graph and return the function that repeats it; SPSA without dropped blocks.

    Args:
        loss: of the model; a watch in it would be captured too.

    Raises:
        Wrong: a repeated step leaves other weights than the method's formula.
    """
    optimizer = Ours(method, model, loss, Watch(device), backend).optimizer
    # transformers may take another path when it is captured: the step is checked with the gradient that it gives there.
    step = optimizer.graphed(loss, warmup=_WARMUP, same_bits=False)
    for _ in range(_WARMUP + 1):
        step()
    windows = Windows(optimizer, model)
    theta = windows.read()
    step()
    *_, end = spsa(windows, theta, optimizer.projected_gradients)
    if off := windows.off(windows.read(), end):
        raise Wrong(f"after a step repeated by its graph {off}")
    return step
