"""A 64-bit fingerprint of a tensor, by PyTorch's own integer arithmetic: equal on every device and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, device

_COLUMNS = 1 << 14
# Rows at a time: what is made of them stays in a processor's cache, or gives a GPU enough to do.
_ROWS = {"cpu": 2, "cuda": 256}
_WORDS = {4: torch.int32, 2: torch.int16}


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int64 x shifted right as an unsigned number."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _odds(first: int, n: int, where: device) -> Tensor:
    """An odd factor for each of n places: SplitMix64's finaliser (`spec.mix`) of the place; int64 products wrap."""
    x = torch.arange(first, first + n, device=where)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return (x ^ _shifted(x, 31)) | 1


@cache
def _columns(where: device) -> Tensor:
    return _odds(0, _COLUMNS, where)


def summed(t: Tensor) -> Tensor:
    """`fingerprint` as an int64 scalar on the tensor's device, which is not waited for."""
    with torch.inference_mode(False), torch.no_grad():
        words = t.detach().reshape(-1).view(_WORDS[t.element_size()])
        columns, n_rows = _columns(t.device), _ROWS.get(t.device.type, 2)
        total = torch.full((), t.numel(), dtype=torch.int64, device=t.device)
        for place, part in enumerate(words.split(n_rows * _COLUMNS)):
            rows = torch.zeros(-(-part.numel() // _COLUMNS) * _COLUMNS, dtype=torch.int64, device=t.device)
            rows[: part.numel()] = part
            sums = (rows.view(-1, _COLUMNS) * columns).sum(1)
            total += (sums * _odds(_COLUMNS + place * n_rows, len(sums), t.device)).sum()
    return total


def fingerprint(t: Tensor) -> str:
    """The sum modulo 2^64 of each element's bits times an odd factor that depends on its index; 16 hex digits.

    Tensors that differ in one element never agree, others with a probability of about 2^-64. It tells weights apart
    that were mixed up, not weights that somebody made to deceive.

    Args:
        t: contiguous, of 16 or 32-bit elements.
    """
    return as_text(int(summed(t)))


def combined(sums: Sequence[Tensor]) -> Tensor:
    """One of several, in their order, as an int64 scalar."""
    every = torch.stack(list(sums))
    return (every * _odds(0, len(every), every.device)).sum()


def as_text(total: int) -> str:
    """16 hex digits."""
    return f"{total % 2**64:016x}"
