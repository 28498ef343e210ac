"""Magnitude masks that stay for a whole run: one bit a weight, kept by parameter in the optimizer's state.

Tables come and go: when a parameter is frozen, moved or cast, new ones are built. So the bits belong to the parameter.
They have the layout that passes read: each run of a shard begins at a byte. What `state_dict()` returns has another,
which does not depend on how a parameter is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts import stretches
from ..modes import inference_mode
from .percentiles import chunk_of
from .shards import Shard, is_sharded, like, local, shard_of
from .tables import Weight, Weights, mask_bytes

MASK = "mask"  # key of a parameter's bits in the optimizer's state
Kept = Mapping[Tensor, dict[str, Any]]  # torch.optim.Optimizer.state
_BITS = 8  # of a byte


def bits_of_run(found: Sequence[Weight], kept: Kept, begun: bool) -> list[Tensor | None]:
    """Return the bits of each weight, uint8 in the layout of `backends.types.MaskKind.BITS`; None if it is dense.

    Args:
        found: the trained weights.
        kept: the optimizer's state. Weights that have no bits there get some.
        begun: whether the run's first step has begun. Weights that come later get the mask of this moment; before, the
            bits are only allocated, and `record_all` writes them.

    Raises:
        ValueError: a threshold is NaN.
    """
    every: list[Tensor | None] = []
    for w in found:
        if w.threshold is None:
            if w.parameter in kept:  # its weights had a threshold before the first step, and have none now
                kept[w.parameter].pop(MASK, None)
            every.append(None)
            continue
        if math.isnan(w.threshold):
            raise ValueError(f"{w.name}: threshold: expected a number, got nan: the weights have NaN")
        size = mask_bytes(w.tensor.numel(), len(w.shard.runs))
        bits = kept[w.parameter].get(MASK)
        if bits is None or bits.numel() != size:
            bits = torch.zeros(size, dtype=torch.uint8, device=w.tensor.device)
            if begun:
                record(bits, w.shard, w.threshold)
        elif bits.device != w.tensor.device:
            bits = bits.to(w.tensor.device)
        kept[w.parameter][MASK] = bits
        every.append(bits)
    return every


def forget(kept: Kept) -> None:
    """Forget all bits, of a run that takes its masks anew in each step."""
    for entry in kept.values():
        entry.pop(MASK, None)


def record_all(weights: Weights) -> None:
    """Write the masks of all weights as they are now, at the beginning of a run's first step."""
    for i, w in enumerate(weights.weights):
        if (bits := weights.bits(i)) is not None and w.threshold is not None:
            record(bits, w.shard, w.threshold)


def record(bits: Tensor, shard: Shard, threshold: float) -> None:
    """Write the mask |w| <= threshold of a shard. Temporary memory does not grow with the shard."""
    most = chunk_of(bits.device)
    with torch.no_grad(), inference_mode(bits.is_inference()):
        for part, out in zip(*_parts(shard, bits), strict=True):
            for at, index in stretches(part.shape, most, _BITS):
                packed = _packed((part[index].float().abs() <= threshold).reshape(1, -1))
                out[at // _BITS : at // _BITS + len(packed)] = packed


def _parts(shard: Shard, bits: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Cut a shard and its bits where a byte is not full: after each run, if their length is no multiple of 8."""
    w, runs = shard.tensor.detach(), len(shard.runs)
    if runs == 1 or w.numel() // runs % _BITS == 0:
        return [w], [bits]
    return w.view(runs, -1).unbind(), bits.view(runs, -1).unbind()


def _packed(rows: Tensor) -> Tensor:
    """Pack bool (rows, n) into uint8 (rows * ceil(n / 8),): the lowest bit is the first, each row begins at a byte."""
    if missing := -rows.shape[1] % _BITS:
        rows = torch.nn.functional.pad(rows, (0, missing))
    # Eight bools are one number, whose byte i is 0 or 1; the product has bit i in bit 56 + i.
    return (rows.reshape(-1).view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def _bytes(n: int) -> int:
    return -(-n // _BITS)


def _unpacked(bits: Tensor, rows: int, n: int) -> Tensor:
    """Undo `_packed`: bool (rows, n)."""
    each = bits[:, None] >> torch.arange(_BITS, dtype=torch.uint8, device=bits.device) & 1
    return each.view(rows, _BITS * _bytes(n))[:, :n].bool()


def _saves_bits(p: Any) -> bool:
    """Whether a state has bits of p: uint8, as many rows as p has, each of which begins at a byte.

    If not, it has bools, of p's shape: if p is one-dimensional, or sharded otherwise than in whole bytes of rows. This
    depends on no rank, so that all agree; and hardly on how p is sharded, so that others may load the state.
    """
    if p.dim() < 2:
        return False
    across = [
        p.device_mesh.size(i)
        for i, placement in enumerate(p.placements if is_sharded(p) else ())
        if not placement.is_replicate() and placement.dim > 0
    ]
    return not across or (p.dim() == 2 and len(across) == 1 and -(-p.shape[1] // across[0]) % _BITS == 0)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the bits of a tensor of this shape."""
    return shape[0], _bytes(math.prod(shape[1:]))


def _to_save(bits: Tensor, p: Tensor, shard: Shard) -> Tensor:
    """Return what a state has as the mask of p."""
    here, runs = shard.tensor.shape, len(shard.runs)
    run, row = shard.tensor.numel() // runs, math.prod(here[1:])
    if not _saves_bits(p):
        return like(p, _unpacked(bits, runs, run).view(here), shard.whole)
    if run % _BITS or row % _BITS:
        bits = _packed(_unpacked(bits, runs, run).view(here[0], row))
    return like(p, bits.view(_rows(here)), _rows(shard.whole))


def saved(state: dict[str, Any], groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return PyTorch's part of a state with masks that processes may load that hold other shards: see `_saves_bits`."""
    parameters = [p for group in groups for p in group["params"]]  # by the numbers that PyTorch gives them
    entries = dict(state["state"])
    for key, entry in state["state"].items():
        if MASK in entry:
            p = parameters[key]
            entries[key] = {**entry, MASK: _to_save(entry[MASK], p, shard_of(names[p], p))}
    return {**state, "state": entries}


def without(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state without masks: PyTorch would cast them to the dtypes of the parameters."""
    entries = {key: {k: v for k, v in entry.items() if k != MASK} for key, entry in state["state"].items()}
    return {**state, "state": entries}


def checked(
    kept: Mapping[Tensor, tuple[str, Mapping[Any, Any]]],
    parameters: Sequence[Tensor],
    thresholds: Sequence[float | None],
    names: Mapping[Tensor, str],
) -> dict[Tensor, Tensor]:
    """Check the masks in a state that is being loaded; return the bits of each parameter, as own copies.

    Args:
        kept: for each parameter with an entry its name, for messages, and the entry.
        parameters: of the optimizer.
        thresholds: of each parameter, in the state; None for one without a mask.
        names: of the parameters.

    Raises:
        TypeError, ValueError: a mask is missing, or is no mask of its parameter.
    """
    found = {}
    for p, h in zip(parameters, thresholds, strict=True):
        if h is None:
            continue
        where, entry = kept.get(p, ("state_dict: state", {}))
        if MASK not in entry:
            raise ValueError(
                f"state_dict: state: expected a mask of {names[p]}, whose run has mask='kept', got none; "
                "torch.distributed.checkpoint loads only what the optimizer has, so make it with mask='kept'"
            )
        found[p] = _bits(f"{where}['{MASK}']", entry[MASK], p, shard_of(names[p], p))
    return found


def _bits(name: str, given: Any, p: Tensor, shard: Shard) -> Tensor:
    """Check what a state has as the mask of p, and return its bits as tables want them."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    w, runs, packed, sharded = shard.tensor, len(shard.runs), _saves_bits(p), is_sharded(p)
    dtype, shape, here = torch.bool, shard.whole, tuple(w.shape)
    if packed:
        dtype, shape, here = torch.uint8, _rows(shape), _rows(here)
    mask = local(given)
    if (
        (given.dtype, tuple(given.shape), tuple(mask.shape), is_sharded(given)) != (dtype, shape, here, sharded)
        or mask.layout != torch.strided
        or mask.is_meta
    ):
        what = f"{'a DTensor of ' * sharded}{'uint8, one bit a weight,' if packed else 'bool'} of shape {shape}"
        got = f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)} on {given.device}"
        raise ValueError(f"{name}: expected {what}, got {got}")
    mask, run, row = mask.detach().to(w.device), w.numel() // runs, math.prod(w.shape[1:])
    if packed and not (run % _BITS or row % _BITS):
        return mask.flatten().clone()
    each = _unpacked(mask.flatten(), w.shape[0], row) if packed else mask
    return _packed(each.reshape(runs, run))
