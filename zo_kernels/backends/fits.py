"""Checks of tables and passes, before any kernel sees them.

A wrong number would make a kernel read or write memory that is not the table's. The native backend checks passes in C++
(csrc/cpu/table.h), where it costs least; the others call `Fits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from numbers import Real

import torch
from torch import Tensor, device

from .. import checks
from ..spec import DISTRIBUTIONS
from .types import Entry, MaskKind, Pass

MOST_GROUPS = 2**31 - 1  # the kernels' tables store a group in 32 bits
# The dtypes of the masks that are tensors.
MASKED = {MaskKind.BOOL: torch.bool, MaskKind.BITS: torch.uint8, MaskKind.RECORD: torch.uint8}

Span = tuple[int, int, str]


class Checked(tuple[Entry, ...]):
    """Entries that were checked before, or pieces of such entries."""


class Fits:
    """Checks the entries of a table when it is built, then each pass over it, in about a microsecond.

    Args:
        entries: checked here, unless they are `Checked`.
        names: names of the entries for errors; None for entries[0], entries[1], ....
        runs: see `ops.Table`.
        any_layout: whether dst and src may be dense without being contiguous.

    Raises:
        TypeError, ValueError: an entry is not what `types.Entry` says, or one writes where another reads or writes.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        names: Sequence[str] | None = None,
        runs: Sequence[Sequence[int]] | None = None,
        *,
        any_layout: bool = False,
    ):
        if not isinstance(entries, Checked):
            names = [f"entries[{i}]" for i in range(len(entries))] if names is None else names
            starts: Sequence[Sequence[int] | None] = [None] * len(entries) if runs is None else runs
            for name, e, each in zip(names, entries, starts, strict=True):
                check_entry(name, e, each, any_layout)
            if entries:
                checks.one_device(names, [e.dst for e in entries])
                check_apart(names, entries)
        self._entries, self._groups = len(entries), max((e.group + 1 for e in entries), default=0)

    def check(self, do: Pass) -> None:
        """Check that a pass fits the table.

        Raises:
            ValueError: it does not.
        """
        if do.distribution not in DISTRIBUTIONS:
            expected = " or ".join(DISTRIBUTIONS)
            raise ValueError(f"distribution: expected {expected}, got {do.distribution!r}")
        if (rows := do.once("rows", rows_of)) < self._groups:
            raise ValueError(f"decays: expected one for each of the table's {self._groups} groups, got {rows}")
        if do.active is not None and (past := do.once("past", _past)) > self._entries:
            raise ValueError(f"active: expected indices of the table's {self._entries} entries, got {past - 1}")


def rows_of(do: Pass) -> int:
    """The number of groups that a pass has numbers for.

    Raises:
        ValueError: its seeds, scales and decays do not fit each other.
    """
    n, scales, decays = len(do.seeds), do.scales, do.decays
    if not n:
        raise ValueError("seeds: expected at least one direction, got none")
    if any(isinstance(s, Tensor) for s in do.seeds) and not all(map(_is_seed, do.seeds)):
        raise ValueError("seeds: expected numbers, or scalar int64 tensors for all of them, got a mixture")
    if isinstance(scales, Tensor):
        _check_dims("scales", scales, 2)
    if isinstance(decays, Tensor):
        _check_dims("decays", decays, 1)
    if len(scales) != len(decays):
        raise ValueError(f"scales: expected a row for each of {len(decays)} decays, got {len(scales)}")
    for g, row in enumerate(scales[:1] if isinstance(scales, Tensor) else scales):
        if isinstance(row, (int, float)) or len(row) != n:
            got = type(row).__name__ if isinstance(row, (int, float)) else len(row)
            raise ValueError(f"scales[{g}]: expected a number for each of {n} seeds, got {got}")
    return len(decays)


def _check_dims(name: str, value: Tensor, dim: int) -> None:
    if value.dim() != dim or not value.is_floating_point():
        raise ValueError(f"{name}: expected a float tensor of {dim} dimensions, got {value.dtype} {value.shape}")


def _is_seed(seed: object) -> bool:
    return isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.dim() == 0


def _past(do: Pass) -> int:
    """The greatest index of an active entry, plus 1."""
    active = do.active or ()
    if active and min(active) < 0:
        raise ValueError(f"active: expected indices of entries, got {min(active)}")
    if len(set(active)) != len(active):
        raise ValueError("active: expected each entry once, got one twice")
    return max(active, default=-1) + 1


def check_on(where: device, do: Pass) -> None:
    """Check that the tensors among a pass's numbers are on the device of its kernel."""
    for name, values in (("seeds", do.seeds), ("scales", [do.scales]), ("decays", [do.decays])):
        for value in values:
            if isinstance(value, Tensor) and value.device != where:
                raise ValueError(f"{name}: expected numbers on {where}, as the table's tensors, got {value.device}")


def check_entry(name: str, e: Entry, starts: Sequence[int] | None = None, any_layout: bool = False) -> None:
    """Check an entry whose stretches begin at `starts` in the whole parameter; None for one stretch, at its offset."""
    _check_tensor(name, e.dst)
    n = e.dst.numel()
    if e.src is not e.dst:
        _check_tensor(f"{name}: src", e.src)
        for what, got, wanted in (
            ("dtype", e.src.dtype, e.dst.dtype),
            ("device", e.src.device, e.dst.device),
            ("number of elements", e.src.numel(), n),
        ):
            if got != wanted:
                raise ValueError(f"{name}: src: expected the {what} of dst, {wanted}, got {got}")
    if not (e.dst.is_contiguous() and e.src.is_contiguous()):
        _check_layout(name, e, 1 if starts is None else len(starts), any_layout)
    checks.integer(f"{name}: param_id", e.param_id, 0, checks.MAX_PARAM_ID)
    if type(e.group) is not int or not 0 <= e.group < MOST_GROUPS:
        checks.integer(f"{name}: group", e.group, 0, MOST_GROUPS - 1)
    starts = (e.offset,) if starts is None else starts
    if not starts or n % len(starts):
        raise ValueError(f"{name}: runs: expected stretches of equal length, got {len(starts)} of {n} elements")
    for start in starts:
        checks.integer(f"{name}: offset", start, 0, checks.MAX_INDEX - n // len(starts))
    if e.mask is not MaskKind.NONE:
        _check_mask(name, e, len(starts))


def _check_tensor(name: str, t: Tensor) -> None:
    checks.weight(name, t)
    if t.data_ptr() % t.element_size():
        size, address = t.element_size(), t.data_ptr()
        raise ValueError(f"{name}: expected memory at a multiple of {size} bytes, got {address}; use a clone()")


def _check_layout(name: str, e: Entry, runs: int, any_layout: bool) -> None:
    strides = f"got strides {e.dst.stride()}, src's {e.src.stride()}"
    if not any_layout:
        raise ValueError(f"{name}: expected contiguous tensors, {strides}; `ops.Table` takes other layouts")
    if runs > 1:
        raise ValueError(f"{name}: expected a contiguous tensor for a shard of {runs} stretches, {strides}")
    if e.src.shape != e.dst.shape:
        raise ValueError(f"{name}: src: expected the shape of dst, {tuple(e.dst.shape)}, got {tuple(e.src.shape)}")
    if e.src.data_ptr() == e.dst.data_ptr() and e.src.stride() != e.dst.stride():
        raise ValueError(f"{name}: src: expected other memory than dst, or its strides, {strides}")


def _check_mask(name: str, e: Entry, runs: int) -> None:
    if not isinstance(e.mask, MaskKind):
        raise TypeError(f"{name}: mask: expected a MaskKind, got {type(e.mask).__name__} {e.mask!r}")
    if isinstance(e.threshold, bool) or not isinstance(e.threshold, Real):
        raise TypeError(f"{name}: threshold: expected a number, got {type(e.threshold).__name__}")
    if math.isnan(e.threshold) and e.mask in (MaskKind.THRESHOLD, MaskKind.RECORD):
        raise ValueError(f"{name}: threshold: expected a number, got nan")
    if e.mask not in MASKED:
        return
    dtype, mask, n = MASKED[e.mask], e.mask_tensor, e.dst.numel()
    length = n if e.mask is MaskKind.BOOL else runs * ((n // runs + 7) // 8)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask_tensor: expected {length} of {dtype}, got {type(mask).__name__}")
    if mask.dtype != dtype or mask.numel() != length:
        raise ValueError(f"{name}: mask_tensor: expected {length} of {dtype}, got {mask.numel()} of {mask.dtype}")
    if mask.device != e.dst.device:
        raise ValueError(f"{name}: mask_tensor: expected the tensor's device {e.dst.device}, got {mask.device}")
    if mask.layout != torch.strided or not mask.is_contiguous():
        raise ValueError(f"{name}: mask_tensor: expected a contiguous tensor, got one that is not")


def check_apart(names: Sequence[str], entries: Sequence[Entry]) -> None:
    """Check that no entry writes where another one writes, or where any one reads, other than itself in place."""
    written: list[Span] = []
    read: list[Span] = []
    for name, e in zip(names, entries, strict=True):
        written.append(_span(name, e.dst))
        if e.src.data_ptr() != e.dst.data_ptr():
            read.append(_span(f"{name}: src", e.src))
        if e.mask in MASKED and e.mask_tensor is not None:
            (written if e.mask is MaskKind.RECORD else read).append(_span(f"{name}: mask_tensor", e.mask_tensor))
    written, read = ([s for s in spans if s[0] < s[1]] for spans in (written, read))
    written.sort()
    for (_, end, left), (begin, _, right) in pairwise(written):
        if begin < end:
            raise ValueError(f"{right}: expected tensors that do not overlap, got memory that {left} has too")
    if not read:
        return
    # In order of their beginnings, each span is compared with the furthest end of earlier spans of the other kind.
    reach, writer = 0, ""
    far, reader = 0, ""
    for begin, end, name, writes in sorted(chain(((*s, True) for s in written), ((*s, False) for s in read))):
        before, other = (far, reader) if writes else (reach, writer)
        if begin < before:
            raise ValueError(
                f"{name}: expected memory that no entry reads and another writes, got some that {other} has"
            )
        if writes:
            reach, writer = end, name
        elif end > far:
            far, reader = end, name


def _span(name: str, t: Tensor) -> Span:
    begin = t.data_ptr()
    return begin, begin + t.nbytes, name
