"""A 64-bit fingerprint of a tensor, by PyTorch's own integer arithmetic: equal on every device and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, device

from ..spec import mix

_COLUMNS = 1 << 14
_ROWS = 2  # at a time: 256 KiB of int64, and as much for the products
_WORDS = {4: torch.int32, 2: torch.int16}


def _odd(i: int) -> int:
    """A signed 64-bit odd factor for place i."""
    x = mix(i) | 1
    return x - 2**64 if x >= 2**63 else x


@cache
def _factors(where: device) -> Tensor:
    return torch.tensor([_odd(i) for i in range(_COLUMNS)], device=where)


def fingerprint(t: Tensor) -> str:
    """The sum modulo 2^64 of each element's bits times an odd factor that depends on its index; 16 hex digits.

    Tensors that differ in one element never agree, others with a probability of about 2^-64. It tells weights apart
    that were mixed up, not weights that somebody made to deceive.

    Args:
        t: contiguous, of 16 or 32-bit elements.
    """
    with torch.inference_mode(False), torch.no_grad():
        words = t.detach().reshape(-1).view(_WORDS[t.element_size()])
        factors = _factors(t.device)
        total = t.numel()
        for place, part in enumerate(words.split(_ROWS * _COLUMNS)):
            rows = torch.zeros(-(-part.numel() // _COLUMNS) * _COLUMNS, dtype=torch.int64, device=t.device)
            rows[: part.numel()] = part
            sums = (rows.view(-1, _COLUMNS) * factors).sum(1).tolist()
            total += sum(s * _odd(_COLUMNS + place * _ROWS + row) for row, s in enumerate(sums))
    return f"{total % 2**64:016x}"


def combined(fingerprints: Sequence[str]) -> str:
    """One of several, in their order."""
    total = sum(int(each, 16) * (mix(place) | 1) for place, each in enumerate(fingerprints))
    return f"{total % 2**64:016x}"
