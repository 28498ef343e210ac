"""How the losses of a step are evaluated: without dropout, and summed in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, so that all losses of a step see one network; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def float64(value: Any, device: torch.device) -> Tensor:
    """A number or a tensor of one element as a scalar on the device; whether it is finite is for the optimizer to see.

    Raises ValueError if it has more elements.
    """
    result = torch.as_tensor(value, device=device).detach()
    if result.numel() != 1:
        raise ValueError(f"compute_loss: expected a scalar, got a tensor of shape {tuple(result.shape)}")
    return result.reshape(()).to(torch.float64)
