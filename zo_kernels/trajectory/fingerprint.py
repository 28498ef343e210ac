"""A 64-bit fingerprint of a tensor in PyTorch's integer arithmetic: the same on every device and thread count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, device

from .. import layouts
from ..modes import inference_mode

_COLUMNS = 1 << 14
# Rows at a time. As int64 they fit a processor's cache, or give a GPU enough work. On a CPU they are also too few for
# PyTorch to use several threads: waiting for those costs more than it saves, above all when another process has a core.
_ROWS = {"cpu": 2, "cuda": 256}
_INTEGER_MV = {"cpu"}  # devices on which torch.mv takes integers
_STAGED = 1 << 20  # elements at a time of a tensor that is not contiguous, in their logical order
_WORDS = {4: torch.int32, 2: torch.int16}


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift int64 x right as if it were unsigned."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _odds(first: int, n: int, where: device) -> Tensor:
    """An odd factor for each of the n indices from `first` on."""
    return _odd(torch.arange(first, first + n, device=where))


def _odd(x: Tensor) -> Tensor:
    """An odd factor for each index x: SplitMix64's finaliser (`spec.mix`), with int64 products that wrap."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return (x ^ _shifted(x, 31)) | 1


@cache
def _columns(where: device) -> Tensor:
    return _odds(0, _COLUMNS, where)


def summed(t: Tensor, runs: Sequence[int] = (0,)) -> Tensor:
    """Sum over the elements of t, modulo 2^64: the element's bits times an odd factor that depends on its index.

    The sums of a tensor's shards add up to that of the whole tensor; plus its number of elements, that is its
    fingerprint. Two tensors that differ in one element never agree; any other two agree with a probability of about
    2^-64. This tells weights apart that were mixed up. It is no defence against weights made to deceive.

    Args:
        t: dense (`layouts.is_dense`), with elements of 16 or 32 bits.
        runs: for a shard, the index in the whole tensor where each of its equally long contiguous runs begins.

    Returns:
        An int64 scalar on the tensor's device; the host does not wait for it.
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
    """The sum over contiguous words, the first of which has the index `first`."""
    where, n = words.device, len(words)
    columns, at_once = _columns(where), _ROWS.get(where.type, 2)
    row, before = divmod(first, _COLUMNS)
    head = min(-before % _COLUMNS, n)  # the rest of a row that began earlier
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
    """Write to `out`, for each row, the sum of its words times the factors of their columns.

    Args:
        scratch: int64, at least as many elements as `rows`; reused, since fresh pages cost more than the arithmetic.
    """
    wide = scratch[: rows.numel()].view(rows.shape)
    if rows.device.type in _INTEGER_MV:  # one pass less than a product and a sum
        torch.mv(wide.copy_(rows), columns, out=out)
    else:
        torch.sum(torch.mul(rows, columns, out=wide), 1, out=out)


def _of_short_stretches(stretches: Tensor, runs: Sequence[int], at_once: int) -> Tensor:
    """The sum over many short runs: several at a time, fewer than `at_once` words, looking up each word's factor."""
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
    """Combine fingerprints, int64 of shape (tensors,), into one int64 scalar; their order matters."""
    return (sums * _odds(0, len(sums), sums.device)).sum()


def as_text(total: int) -> str:
    """A fingerprint as 16 hex digits."""
    return f"{total % 2**64:016x}"
