"""What ranks do that hold shards of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from models import BlockMLP, block_mlp, real_loss
from scenarios import build
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zo_kernels as zo

SHAPE = {"depth": 3, "width": 6}  # of which 4 ranks get unequal shards, and some of them nothing
EPS = 0.02


def plain(model: BlockMLP, group: Any) -> BlockMLP:
    return model


def fsdp(model: BlockMLP, group: Any) -> BlockMLP:
    """Every block by itself, and what is left with the root."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hybrid(model: BlockMLP, group: Any) -> BlockMLP:
    """Two copies of two shards."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel(model: BlockMLP, group: Any) -> BlockMLP:
    return _columns_and_rows(model, DeviceMesh.from_group(group, "cpu"))


def _columns_and_rows(model: BlockMLP, mesh: DeviceMesh) -> BlockMLP:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def both(model: BlockMLP, group: Any) -> BlockMLP:
    """FSDP over tensor parallelism: shards of shards, on one dimension or on two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    _columns_and_rows(model, mesh["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


LAYOUTS = {"plain": plain, "fsdp": fsdp, "hybrid": hybrid, "tensor": tensor_parallel, "both": both}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights, put together."""
    with torch.no_grad():
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
            for name, p in model.named_parameters()
        }


def scripted(step: int) -> Callable[[], float]:
    """Losses that do not come from the model, so that they are equal whatever computes in which order."""
    calls = iter(range(100))
    return lambda: 1.0 + EPS * torch.tensor(1.0 + 2.3 * next(calls) + 7.1 * step).cos().item()


def moved(group: Any, layout: str, method: str, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Steps with scripted losses."""
    model = LAYOUTS[layout](block_mlp(dtype=dtype, **SHAPE), group)
    options = {"perturb": "in_place", "eps": EPS, "lr": 0.1, **options}
    opt = build(method, model, parallel=zo.Parallel("batch", group, check_every=2), **options)
    for step in range(7):
        opt.step(*[scripted(step), scripted(step + 50)][: 1 + (method == "MeZOSVRG")])
    return {
        "weights": whole(model),
        "trajectory": opt.trajectory.to_bytes(),
        "sharded": sorted(name for name, p in model.named_parameters() if isinstance(p, DTensor)),
    }


def noise(group: Any, layout: str) -> dict[str, Tensor]:
    """What one perturbation adds to weights of zero."""
    model = block_mlp(**SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model = LAYOUTS[layout](model, group)
    opt = zo.MeZO(model, lr=0.1, eps=1.0, seed=3, parallel=zo.Parallel("batch", group))
    seen: list[dict[str, Tensor]] = []

    def closure() -> float:
        seen.append(whole(model))
        return 0.0

    opt.step(closure)
    return seen[0]


def trained(group: Any, layout: str, steps: int, *, after_evaluation: bool = False) -> dict[str, Any]:
    """Steps with the model's own losses, of a part of the batch for each rank."""
    model = LAYOUTS[layout](block_mlp(**SHAPE), group)
    if after_evaluation:
        with torch.no_grad():
            real_loss(model, 0)
    opt = zo.MeZO(model, lr=1e-2, parallel=zo.Parallel("batch", group))
    # Ranks that hold parts of one layer's work see one batch.
    part, losses = distributed.get_rank(group) // {"tensor": 2, "both": 2}.get(layout, 1), []
    for step in range(steps):
        losses.append(float(opt.step(lambda step=step: real_loss(model, 4 * step + part).double())))
    with torch.no_grad():
        evaluated = real_loss(model, 999)
    return {"weights": whole(model), "losses": losses, "evaluated": float(evaluated)}


def resumed(group: Any, path: str, layout: str, method: str, upto: int) -> dict[str, Any]:
    model = LAYOUTS[layout](block_mlp(**SHAPE), group)
    mask = "kept" if method == "MeZO" else "redrawn"
    opt = build(method, model, sparsity=0.5, mask=mask, eps=EPS, parallel=zo.Parallel("batch", group))
    opt.resume(path, missing_ok=True)
    while (step := opt.step_count) < upto:
        opt.step(*[scripted(step), scripted(step + 50)][: 1 + (method == "MeZOSVRG")])
    return {"weights": whole(model)}


def saved(group: Any, layout: str, method: str, mask: str) -> bool:
    """A state taken and loaded in the middle goes on with the same bits."""
    after, options = [], {"sparsity": 0.5, "eps": EPS, "lr": 0.1, "parallel": zo.Parallel("batch", group)}
    for again in (False, True):
        model = LAYOUTS[layout](block_mlp(**SHAPE), group)
        opt = build(method, model, mask=mask, **options)
        for step in range(7):
            if step == 3 and again:
                state = opt.state_dict()
                opt = build(method, model, **options)
                opt.load_state_dict(state)
            opt.step(*[scripted(step), scripted(step + 50)][: 1 + (method == "MeZOSVRG")])
        after.append(whole(model))
    return all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def checkpointed(group: Any, path: str, layout: str, steps: range) -> dict[str, Tensor]:
    """Go on from a distributed checkpoint, unless the run begins, and leave one."""
    model = LAYOUTS[layout](block_mlp(depth=2, width=8), group)  # shards of its rows are whole bytes of bits
    opt = build("SparseMeZO", model, mask="kept", lr=0.1, eps=EPS, parallel=zo.Parallel("batch", group))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch deprecates what it calls itself
        if steps.start:
            state = {"model": model.state_dict(), "opt": opt.state_dict()}
            dcp.load(state, checkpoint_id=path, process_group=group)
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["opt"])
        for step in steps:
            opt.step(scripted(step))
        state = {"model": model.state_dict(), "opt": opt.state_dict()}
        dcp.save(state, checkpoint_id=path, process_group=group)
    return whole(model)


def masks_of(group: Any, layout: str) -> dict[str, tuple[torch.dtype, list[int]]]:
    """The dtype and the shape of each mask in a state, as a whole."""
    model = LAYOUTS[layout](block_mlp(**SHAPE), group)
    opt = build("SparseMeZO", model, mask="kept", parallel=zo.Parallel("batch", group))
    names = [name for name, _ in model.named_parameters()]
    found = {names[i]: entry["mask"] for i, entry in opt.state_dict()["state"].items()}
    return {name: (mask.dtype, list(mask.shape)) for name, mask in found.items()}


def elements(group: Any, layout: str) -> bool:
    """Whether each shard's stretches are the elements that PyTorch says are there."""
    from zo_kernels.weights.shards import shard_of

    model = block_mlp(**SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    right = True
    for name, p in LAYOUTS[layout](model, group).named_parameters():
        shard = shard_of(name, p)
        if n := shard.tensor.numel():
            length = n // len(shard.runs)
            expected = torch.cat([torch.arange(start, start + length) for start in shard.runs])
            right &= torch.equal(shard.tensor.detach().reshape(-1), expected.float())
    return right


def refusals(group: Any) -> list[str]:
    """What is said of shards that cannot be trained as asked."""
    from torch.distributed.tensor import Partial

    mesh = DeviceMesh.from_group(group, "cpu")
    sharded = fsdp(block_mlp(**SHAPE), group)
    partial = nn.Linear(2, 2)
    partial.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False))
    flat = nn.Linear(2, 2)
    flat.__class__ = type("FullyShardedDataParallel", (nn.Linear,), {})
    partitioned = nn.Linear(2, 2)
    partitioned.weight.ds_id = 0
    how = zo.Parallel("batch", group)
    said = []
    for make in (
        lambda: zo.MeZO(sharded, lr=0.1, perturb="in_forward", parallel=how),
        lambda: zo.MeZO(list(sharded.parameters()), lr=0.1, parallel=how),
        lambda: zo.MeZO(sharded, lr=0.1, directions=2, parallel=zo.Parallel("directions", group)),
        lambda: zo.MeZO(partial, lr=0.1, parallel=how),
        lambda: zo.MeZO(flat, lr=0.1, parallel=how),
        lambda: zo.MeZO(partitioned, lr=0.1, parallel=how),
    ):
        try:
            make()
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said
