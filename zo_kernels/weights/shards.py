"""The part of a parameter that this process holds: all of it, or a shard (DTensor: FSDP2, tensor parallel)."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a parameter's elements.

    Attributes:
        name: of the parameter.
        tensor: this process's elements; a plain tensor, the parameter itself if it is whole. Writing to it changes the
            parameter.
        whole: shape of the whole parameter.
        starts: along each of its dimensions, the index of the first element here.
        groups: process groups over which the whole is spread: what is summed over each of them in turn is summed over
            the whole.
    """

    name: str
    tensor: Tensor
    whole: tuple[int, ...]
    starts: tuple[int, ...]
    groups: tuple[Any, ...] = ()

    @property
    def runs(self) -> list[int]:
        """The index in the whole of the first element of each stretch; all are equally long, one after the other."""
        local = tuple(self.tensor.shape)
        strides = [math.prod(self.whole[d + 1 :]) for d in range(len(local))]
        # The last dimension that is not whole: with all behind it, it is one stretch.
        last = max((d for d in range(len(local)) if local[d] != self.whole[d]), default=0)
        begin = sum(s * stride for s, stride in zip(self.starts, strides, strict=True))
        if not self.tensor.numel():
            return [0]
        outer = [[i * strides[d] for i in range(local[d])] for d in range(last)]
        return [begin + sum(at) for at in itertools.product(*outer)]

    def summed(self, values: Tensor) -> Tensor:
        """Values of this process's elements, added up over the whole; in place."""
        for group in self.groups:
            torch.distributed.all_reduce(values, group=group)
        return values


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor, on whatever mesh."""
    return hasattr(p, "to_local")


def local(p: Tensor) -> Tensor:
    """The plain tensor with this process's elements of p: p itself if it is plain."""
    if not is_sharded(p):
        return p
    with torch.no_grad():
        return p.to_local()  # type: ignore[attr-defined]


def shard_of(name: str, p: Any) -> Shard:
    """What of p is here.

    Raises:
        ValueError: it is spread in a way that is none of rows, columns or copies.
    """
    if not is_sharded(p):
        return Shard(name, p, tuple(p.shape), (0,) * p.dim())
    mesh, placements = p.device_mesh, p.placements
    bounds = [(0, n) for n in p.shape]
    groups = []
    # FSDP over tensor parallelism on one dimension is written as a strided shard, which comes after the plain one.
    order = sorted(range(mesh.ndim), key=lambda i: type(placements[i]).__name__ == "_StridedShard")
    for i in order:
        placement = placements[i]
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            raise ValueError(
                f"{name}: expected a parameter in shards or copies (Shard, Replicate), got the placement {placement}"
            )
        groups.append(mesh.get_group(i))
        start, end = bounds[placement.dim]
        bounds[placement.dim] = _chunk(start, end, mesh.size(i), mesh.get_local_rank(i))
    here = local(p)
    shape = tuple(end - start for start, end in bounds)
    if tuple(here.shape) != shape:
        raise ValueError(
            f"{name}: expected a shard of shape {shape}, which its placements {placements} on {mesh} lead to, got "
            f"{tuple(here.shape)}"
        )
    return Shard(name, here, tuple(p.shape), tuple(start for start, _ in bounds), tuple(groups))


def like(p: Any, t: Tensor) -> Tensor:
    """The elements that are here, as what p is: a DTensor, or the plain tensor."""
    if not is_sharded(p):
        return t
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _chunk(start: int, end: int, count: int, which: int) -> tuple[int, int]:
    """One of `count` stretches of [start, end), as torch.chunk makes them."""
    size = -(-(end - start) // count)
    return min(start + which * size, end), min(start + (which + 1) * size, end)


def cannot_be_trained(module: nn.Module | None, named: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why these parameters of the module are not what they seem, or not in one place; None if all is well."""
    for m in module.modules() if module is not None else ():
        if type(m).__name__ == "FullyShardedDataParallel":
            return "params: FullyShardedDataParallel flattens parameters; shard the model with fully_shard (FSDP2)"
    for name, p in named:
        if hasattr(p, "ds_id"):
            return (
                f"{name}: DeepSpeed ZeRO-3 has partitioned it, so that it is empty between forwards; shard the model "
                "with fully_shard (FSDP2), or leave ZeRO out: there are no gradients or optimizer states to partition"
            )
        if p.is_meta:
            return (
                f"{name}: expected a tensor with data, got one on the meta device, as when accelerate has offloaded "
                "it; load the whole model on the CPU instead, and give execution_device= for its forwards"
            )
        if p.device != named[0][1].device:
            return (
                f"{name}: expected device {named[0][1].device}, as {named[0][0]}, got {p.device}; shard the model over "
                "devices with fully_shard (FSDP2), or keep it on the CPU and give execution_device= for its forwards"
            )
        if module is None and is_sharded(p):
            return f"{name}: a sharded parameter (DTensor) came without the module that gathers it; give the module"
    return None


def resharding(module: nn.Module | None) -> Callable[[], None] | None:
    """What makes FSDP forget the whole weights that it has gathered, so that it gathers those of the shards anew; None
    if nothing in the module is FSDP's.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever uses it has imported it
    if module is None or fsdp is None:
        return None
    gathering: list[Any] = [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]

    def reshard() -> None:
        for m in gathering:
            m.reshard()

    return reshard if gathering else None
