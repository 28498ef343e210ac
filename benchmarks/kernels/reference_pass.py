"""One pass over a window of a weight as the reference makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.backends import reference
from zo_kernels.backends.types import Entry, Pass


def moved(window: Tensor, seed: int, scale: float, param_id: int, *, offset: int = 0, rounding: str) -> Tensor:
    """round(w + scale z); the window is left alone. `offset` is the index of its first element."""
    result = torch.empty_like(window)
    do = Pass([seed], [[scale]], [1.0], rounding == "stochastic")
    reference.prepare([Entry(result, window, param_id, offset)])(do)
    return result


def differing(got: Tensor, expected: Tensor) -> int:
    """How many elements have other bits."""
    words = {4: torch.int32, 2: torch.int16}[got.element_size()]
    return int((got.detach().view(words) != expected.detach().view(words)).sum())
