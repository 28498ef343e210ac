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
    """An odd factor for each of n places from `first` on."""
    return _odd(torch.arange(first, first + n, device=where))


def _odd(x: Tensor) -> Tensor:
    """An odd factor for each place x: SplitMix64's finaliser (`spec.mix`); int64 products wrap."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return (x ^ _shifted(x, 31)) | 1


@cache
def _columns(where: device) -> Tensor:
    return _odds(0, _COLUMNS, where)


def summed(t: Tensor, runs: Sequence[int] = (0,)) -> Tensor:
    """The sum modulo 2^64 of each element's bits times an odd factor that depends on its index, as an int64 scalar on
    the tensor's device, which is not waited for. Those of a tensor's shards add up to that of the whole; with its
    number of elements added, that is its fingerprint.

    Tensors that differ in one element never agree, others with a probability of about 2^-64. It tells weights apart
    that were mixed up, not weights that somebody made to deceive.

    Args:
        t: contiguous, of 16 or 32-bit elements.
        runs: the index in the whole of the first element of each of the equally long stretches that t falls into.
    """
    with torch.inference_mode(False), torch.no_grad():
        words = t.detach().reshape(-1).view(_WORDS[t.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=t.device)
        if len(runs) == 1:
            return _add_run(total, words, runs[0])
        words = words.view(len(runs), -1)
        at_most = max(1, _ROWS.get(t.device.type, 2) * _COLUMNS // words.shape[1])
        columns = torch.arange(words.shape[1], device=t.device)
        starts = torch.tensor(runs, device=t.device)[:, None]
        for part, first in zip(words.split(at_most), starts.split(at_most), strict=True):
            index = first + columns
            total += (part * _odd(index % _COLUMNS) * _odd(_COLUMNS + index // _COLUMNS)).sum()
    return total


def _add_run(total: Tensor, words: Tensor, first: int) -> Tensor:
    """Add the words of one stretch, whose first element has the index `first`."""
    where = words.device
    columns, n_rows = _columns(where), _ROWS.get(where.type, 2)
    row, before = divmod(first, _COLUMNS)
    while words.numel():
        part, words = words[: n_rows * _COLUMNS - before], words[n_rows * _COLUMNS - before :]
        rows = torch.zeros(-(-(before + part.numel()) // _COLUMNS) * _COLUMNS, dtype=torch.int64, device=where)
        rows[before : before + part.numel()] = part
        sums = (rows.view(-1, _COLUMNS) * columns).sum(1)
        total += (sums * _odds(_COLUMNS + row, len(sums), where)).sum()
        row, before = row + n_rows, 0
    return total


def combined(sums: Tensor) -> Tensor:
    """One of several fingerprints, int64 (tensors,), in their order, as an int64 scalar."""
    return (sums * _odds(0, len(sums), sums.device)).sum()


def as_text(total: int) -> str:
    """16 hex digits."""
    return f"{total % 2**64:016x}"
