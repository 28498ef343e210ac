"""A 64-bit fingerprint of a tensor, by PyTorch's own integer arithmetic: equal on every device and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, device

from .. import layouts
from ..modes import inference_mode

_COLUMNS = 1 << 14
# Rows at a time: as int64 they stay in a processor's cache, or give a GPU enough to do. On a CPU, also too few for
# PyTorch to share among threads: waiting for these costs more than it saves, most of all where other work holds a core.
_ROWS = {"cpu": 2, "cuda": 256}
_INTEGER_MV = {"cpu"}  # where PyTorch multiplies matrices by vectors of integers
_STAGED = 1 << 20  # elements at a time of a tensor that is not contiguous, in their logical order
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
        t: dense (`layouts.is_dense`), of 16 or 32-bit elements.
        runs: the index in the whole of the first element of each of the equally long stretches that t falls into.
    """
    with inference_mode(False), torch.no_grad():
        if len(runs) == 1 and not t.is_contiguous():
            parts = [(t[index], runs[0] + at) for at, index in layouts.stretches(t.shape, _STAGED) if index]
            if parts:
                return torch.stack([summed(part.contiguous(), [first]) for part, first in parts]).sum()
        words = t.detach().reshape(-1).view(_WORDS[t.element_size()])
        if not len(words):
            return torch.zeros((), dtype=torch.int64, device=t.device)
        at_once = _ROWS.get(t.device.type, 2) * _COLUMNS
        stretches = words.view(len(runs), -1)
        if len(runs) == 1 or 2 * stretches.shape[1] > at_once:
            sums = [_of_stretch(each, first) for each, first in zip(stretches, runs, strict=True)]
            return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
        return _of_short_stretches(stretches, runs, at_once)


def _of_stretch(words: Tensor, first: int) -> Tensor:
    """What is added by words one after the other, of which the first has the index `first`."""
    where, n = words.device, len(words)
    columns, at_once = _columns(where), _ROWS.get(where.type, 2)
    row, before = divmod(first, _COLUMNS)
    head = min(-before % _COLUMNS, n)  # the end of a row that began earlier
    whole = (n - head) // _COLUMNS
    tail = head + whole * _COLUMNS
    sums = torch.empty(bool(head) + whole + (tail < n), dtype=torch.int64, device=where)
    scratch = torch.empty(min(at_once * _COLUMNS, n), dtype=torch.int64, device=where)
    if head:
        _sum_rows(words[None, :head], columns[before : before + head], scratch, sums[:1])
    if whole:
        rows = words[head:tail].view(whole, _COLUMNS).split(at_once)
        for part, out in zip(rows, sums[bool(head) :][:whole].split(at_once), strict=True):
            _sum_rows(part, columns, scratch, out)
    if tail < n:
        _sum_rows(words[None, tail:], columns[: n - tail], scratch, sums[-1:])
    return sums.mul_(_odds(_COLUMNS + row, len(sums), where)).sum()


def _sum_rows(rows: Tensor, columns: Tensor, scratch: Tensor, out: Tensor) -> None:
    """To `out`, of each row the sum of its words times the columns' factors; `scratch` is int64, of as many elements
    as `rows` or more. It is there to be used again: fresh pages cost more than the arithmetic.
    """
    wide = scratch[: rows.numel()].view(rows.shape)
    if rows.device.type in _INTEGER_MV:  # one pass less than products that are then added
        torch.mv(wide.copy_(rows), columns, out=out)
    else:
        torch.sum(torch.mul(rows, columns, out=wide), 1, out=out)


def _of_short_stretches(stretches: Tensor, runs: Sequence[int], at_once: int) -> Tensor:
    """Several at a time, with each word's factors looked up, fewer words than `at_once`."""
    where, n = stretches.device, stretches.shape[1]
    columns, row = _columns(where), min(runs) // _COLUMNS
    rows = _odds(_COLUMNS + row, (max(runs) + n - 1) // _COLUMNS - row + 1, where)
    places = torch.arange(n, device=where)
    starts = torch.tensor(runs, device=where)[:, None] - row * _COLUMNS
    at_most = (at_once - 1) // n
    total = torch.zeros((), dtype=torch.int64, device=where)
    for part, start in zip(stretches.split(at_most), starts.split(at_most), strict=True):
        index = start + places
        products = torch.take(columns, index & (_COLUMNS - 1)).mul_(part)
        index >>= _COLUMNS.bit_length() - 1
        total += products.mul_(torch.take(rows, index)).sum()
    return total


def combined(sums: Tensor) -> Tensor:
    """One of several fingerprints, int64 (tensors,), in their order, as an int64 scalar."""
    return (sums * _odds(0, len(sums), sums.device)).sum()


def as_text(total: int) -> str:
    """16 hex digits."""
    return f"{total % 2**64:016x}"
