"""The part of a parameter that this process holds: all of it, or one shard of a DTensor (FSDP2, tensor parallelism)."""

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
    """The elements of a parameter that this process holds: a box of its index space.

    Attributes:
        name: the parameter's name.
        tensor: this process's elements as a plain tensor; the parameter itself if it is not sharded. Writing to it
            changes the parameter.
        whole: shape of the whole parameter.
        starts: along each dimension, the index of this process's first element.
        groups: the process groups that the parameter is spread over. A sum over each of them in turn is a sum over the
            whole parameter.
    """

    name: str
    tensor: Tensor
    whole: tuple[int, ...]
    starts: tuple[int, ...]
    groups: tuple[Any, ...] = ()

    @property
    def runs(self) -> list[int]:
        """Where each of the equally long runs begins that the shard forms in the whole, flattened parameter."""
        local = tuple(self.tensor.shape)
        strides = [math.prod(self.whole[d + 1 :]) for d in range(len(local))]
        # The last dimension that is not whole: it and all after it form one run.
        last = max((d for d in range(len(local)) if local[d] != self.whole[d]), default=0)
        begin = sum(s * stride for s, stride in zip(self.starts, strides, strict=True))
        if not self.tensor.numel():
            return [0]
        outer = [[i * strides[d] for i in range(local[d])] for d in range(last)]
        return [begin + sum(at) for at in itertools.product(*outer)]

    def summed(self, values: Tensor) -> Tensor:
        """Sum values over the processes that hold the parameter, in place; all of them must call this together."""
        for group in self.groups:
            torch.distributed.all_reduce(values, group=group)
        return values


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor, on any mesh."""
    return hasattr(p, "to_local")


def local(p: Tensor) -> Tensor:
    """Return this process's elements of p as a plain tensor; p itself if it is one."""
    if not is_sharded(p):
        return p
    with torch.no_grad():
        return p.to_local()  # type: ignore[attr-defined]


def shard_of(name: str, p: Any) -> Shard:
    """Find the part of p that this process holds.

    Raises:
        ValueError: p has a placement other than shards and copies.
    """
    if not is_sharded(p):
        return Shard(name, p, tuple(p.shape), (0,) * p.dim())
    mesh, placements = p.device_mesh, p.placements
    bounds = [(0, n) for n in p.shape]
    groups = []
    # With FSDP and tensor parallelism on one dimension, DTensor marks FSDP's as a strided shard: it divides last.
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
            f"{name}: expected a shard of shape {shape}, as its placements {placements} on {mesh} imply, got "
            f"{tuple(here.shape)}"
        )
    return Shard(name, here, tuple(p.shape), tuple(start for start, _ in bounds), tuple(groups))


def like(p: Any, t: Tensor, whole: tuple[int, ...] | None = None) -> Tensor:
    """Wrap `t`, this process's elements, as p is: a DTensor with p's placements, or the plain tensor.

    Args:
        whole: the shape of all elements, in contiguous order; None for p's shape and strides.
    """
    if not is_sharded(p):
        return t
    from torch.distributed.tensor import DTensor

    shape, stride = p.shape, p.stride()
    if whole is not None:
        shape, stride = torch.Size(whole), tuple(math.prod(whole[i + 1 :]) for i in range(len(whole)))
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _chunk(start: int, end: int, count: int, which: int) -> tuple[int, int]:
    """The bounds of chunk `which` when [start, end) is divided in `count`, as torch.chunk does."""
    size = -(-(end - start) // count)
    return min(start + which * size, end), min(start + (which + 1) * size, end)


def summed_over(shards: Sequence[Shard], sums: Tensor) -> Tensor:
    """Sum each shard's value over its whole parameter, in place; the processes that hold one must call this together.

    Args:
        sums: one value for each of `shards`.
    """
    groups: dict[Any, list[int]] = {}
    for i, shard in enumerate(shards):
        for group in shard.groups:
            groups.setdefault(group, []).append(i)
    # In an order that all processes share: that of the parameters, then of each one's groups.
    for group, members in groups.items():
        part = sums[members]
        torch.distributed.all_reduce(part, group=group)
        sums[members] = part
    return sums


def cannot_be_trained(module: nn.Module | None, named: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why these parameters cannot be trained (flattened, partitioned, no data, on two devices); None if they can."""
    for m in module.modules() if module is not None else ():
        if type(m).__name__ == "FullyShardedDataParallel":
            return "params: FullyShardedDataParallel flattens parameters; shard the model with fully_shard (FSDP2)"
    for name, p in named:
        if hasattr(p, "ds_id"):
            return (
                f"{name}: DeepSpeed ZeRO-3 has partitioned it, so it is empty between forwards; shard the model with "
                "fully_shard (FSDP2), or do without ZeRO: there are no gradients or optimizer states to partition"
            )
        if p.is_meta:
            return (
                f"{name}: expected a tensor with data, got one on the meta device, as accelerate offloads weights; "
                "load the whole model on the CPU instead, and give execution_device= for its forwards"
            )
        if p.device != named[0][1].device:
            return (
                f"{name}: expected device {named[0][1].device}, where {named[0][0]} is, got {p.device}; shard the "
                "model over devices with fully_shard (FSDP2), or keep it on the CPU and give execution_device= for "
                "its forwards"
            )
        if module is None and is_sharded(p):
            return (
                f"{name}: expected the module, which gathers sharded parameters (DTensor), got the parameter alone; "
                "give the module"
            )
    return None


def resharding(module: nn.Module | None) -> Callable[[], None] | None:
    """Return a function that makes FSDP drop the weights it has gathered, so that it gathers the current shards again;
    None if no part of the module is FSDP's.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # imported already if the module uses it
    if module is None or fsdp is None:
        return None
    gathering: list[Any] = [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]

    def reshard() -> None:
        for m in gathering:
            m.reshard()

    return reshard if gathering else None
