"""What the ranks do in these tests. Every scenario gets its process group first, and returns plain numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from inside import losses_stay
from models import block_mlp, real_loss
from torch import Tensor, distributed, nn

import zo_kernels as zo

SHAPE = {"depth": 2, "width": 4}
MICRO_BATCHES = 4  # of a step, over all ranks
METHODS = {"MeZO": zo.MeZO, "SparseMeZO": zo.SparseMeZO, "LeZO": zo.LeZO, "MeZOSVRG": zo.MeZOSVRG, "FZOO": zo.FZOO}


def build(method: str, model: nn.Module, **options: Any) -> zo.ZeroOrderOptimizer:
    if method == "MeZOSVRG":
        options = {"anchor_lr": 1e-2, "anchor_every": 5, **options}
    if method == "FZOO":
        options = {"directions": 2, **options}
    if method == "LeZO":
        options = {"drop": 0.5, **options}
    return METHODS[method](model, **{"lr": 1e-2, "seed": 7, **options})


def shared_batch(model: nn.Module, group: Any, step: int) -> Callable[[], Tensor]:
    """The mean loss of this rank's share of the step's micro-batches."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    own = range(MICRO_BATCHES)[rank::size]

    def closure() -> Tensor:
        return sum(real_loss(model, MICRO_BATCHES * step + i).double() for i in own) / len(own)

    return closure


def whole_batch(model: nn.Module, group: Any, step: int) -> Callable[[], Tensor]:
    return lambda: real_loss(model, step)


CLOSURES = {"batch": shared_batch, "directions": whole_batch}


def take_step(opt: zo.ZeroOrderOptimizer, model: nn.Module, group: Any, split: str) -> Any:
    make = CLOSURES[split]
    closures = [make(model, group, opt.step_count)]
    if isinstance(opt, zo.MeZOSVRG):
        closures.append(make(model, group, 1000))
    return opt.step(*closures)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all weights have equal bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def train(
    group: Any, method: str, split: str, steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    model = block_mlp(dtype=dtype, **SHAPE)
    opt = build(method, model, parallel=zo.Parallel(split, group, check_every=10), **options)
    losses = [float(take_step(opt, model, group, split)) for _ in range(steps)]
    return {
        "weights": weights_of(model),
        "losses": losses,
        "trajectory": opt.trajectory.to_bytes(),
        "sent": opt.bytes_sent,
        "gradients": opt.projected_gradients,
    }


def find_lr(group: Any, split: str, **options: Any) -> dict[str, Any]:
    """From a rate at which the last rank's loss is soon nan."""
    model = block_mlp(**SHAPE)
    before, make, parallel = weights_of(model), CLOSURES[split], zo.Parallel(split, group)
    last = distributed.get_rank(group) == distributed.get_world_size(group) - 1

    def closure(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        return value * (float("nan") if last and value > 20 else 1.0)

    def closures() -> Iterator[Callable[[], Tensor]]:
        return (partial(closure, make(model, group, step)) for step in itertools.count())

    found = zo.find_lr(model, closures, parallel=parallel, start=8.0, steps=10, **options)
    return {"found": found, "same": same(weights_of(model), before)}


def train_on_device(group: Any, event: str, split: str, **options: Any) -> dict[str, Any]:
    """Losses stay where they are, as on a GPU. In the fourth step one rank's is nan, or its learning rate another."""
    with pytest.MonkeyPatch.context() as patch:
        losses_stay(patch)
        model = block_mlp(**SHAPE)
        opt = build("MeZO", model, parallel=zo.Parallel(split, group, check_every=5), **options)
        said = ""
        for step in range(12):
            good = CLOSURES[split](model, group, step)
            odd = step == 3 and distributed.get_rank(group) == 1
            opt.param_groups[0]["lr"] = 0.5 if odd and event == "rate" else 1e-2
            try:
                opt.step((lambda good=good: good() * float("nan")) if odd and event == "nan" else good)
            except zo.RanksDiffer as error:
                said = str(error)
                break
        return {
            "weights": weights_of(model),
            "said": said,
            "steps": opt.step_count,
            "trajectory": opt.trajectory.to_bytes(),
            "refused": opt.refused_steps,
        }


def count_bytes(group: Any, split: str, directions: int, steps: int) -> dict[str, Any]:
    """All that collectives were given while steps were taken, and what the optimizer says it sent."""
    group_type = distributed.ProcessGroup  # all functions of torch.distributed end there
    starts = ("all", "_all", "broadcast", "reduce", "_reduce", "gather", "scatter", "send", "barrier")
    names = [n for n in vars(group_type) if n.startswith(starts)]
    given: list[tuple[str, int]] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            flat = [a[0] for a in args if isinstance(a, list) and isinstance(a[0], Tensor)]
            given.append((name, flat[-1].numel() * flat[-1].element_size() if flat else -1))
            return original(*args, **kwargs)

        return call

    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, directions=directions, parallel=zo.Parallel(split, group, check_every=2))
    originals = {name: vars(group_type)[name] for name in names}
    for name in names:
        setattr(group_type, name, counting(name, getattr(group_type, name)))
    try:
        for _ in range(steps):
            take_step(opt, model, group, split)
    finally:
        for name, original in originals.items():
            setattr(group_type, name, original)
    return {"given": given, "sent": opt.bytes_sent}


def corrupted(group: Any, rank: int, steps: int, name: str, by_torch: bool = False) -> tuple[int, str]:
    """A weight of one rank changes by itself, or is set, after some steps. When it is noticed, and what is said."""
    model = block_mlp(**SHAPE)
    opt = build("MeZO", model, parallel=zo.Parallel("batch", group, check_every=4))
    for step in range(20):
        if step == steps and distributed.get_rank(group) == rank:
            weight = model.get_parameter(name).detach()
            (weight if by_torch else weight.data).view(-1)[1] += 1e-6
        try:
            take_step(opt, model, group, "batch")
        except zo.RanksDiffer as error:
            return step, str(error)
    return -1, ""


def told_apart(group: Any, rank: int, **options: Any) -> str:
    """One rank makes its optimizer otherwise; what is said at the first step."""
    model = block_mlp(**SHAPE)
    given = {"eps": 1e-3, **(options if distributed.get_rank(group) == rank else {})}
    skip = given.pop("skip", 0)
    opt = build("MeZO", model, parallel=zo.Parallel("batch", group), **given)
    opt.step_count += skip
    try:
        take_step(opt, model, group, "batch")
    except zo.RanksDiffer as error:
        return str(error)
    return ""


def goes_wrong(group: Any, method: str, split: str, failing: int, event: str, perturb: str) -> dict[str, Any]:
    """In the third step one rank's loss is nan, or its closure raises, at its first call; then three steps more."""
    model = block_mlp(**SHAPE)
    start = block_mlp(**SHAPE)
    opt = build(method, model, perturb=perturb, parallel=zo.Parallel(split, group, check_every=1))
    said = ""
    for step in range(6):
        good = CLOSURES[split](model, group, opt.step_count)
        calls = iter(range(100))

        def closure(good: Any = good, step: int = step, calls: Any = calls) -> Any:
            if step == 2 and distributed.get_rank(group) == failing and next(calls) == 0:
                if event == "raise":
                    raise KeyError("lost")
                good()
                return float("nan")
            return good()

        try:
            opt.step(closure)
        except (ValueError, RuntimeError, KeyError) as error:
            said = f"{type(error).__name__}: {error}"
    zo.replay(start, opt.trajectory)
    return {
        "weights": weights_of(model),
        "replayed": weights_of(start),
        "said": said,
        "steps": opt.step_count,
        "refused": opt.refused_steps,
    }


def cut_off(group: Any, path: str, method: str, split: str, steps: int, upto: int, **options: Any) -> dict[str, Any]:
    """Go on with the run whose trajectory is at the path, or begin it."""
    model = block_mlp(**SHAPE)
    opt = build(method, model, parallel=zo.Parallel(split, group, check_every=3), **options)
    opt.resume(path, missing_ok=True)
    while opt.step_count < upto:
        take_step(opt, model, group, split)
    return {"weights": weights_of(model), "steps": opt.trajectory.steps}


def wrapped(group: Any, perturb: str) -> dict[str, Tensor]:
    """As `train`, of a model in DistributedDataParallel."""
    model = block_mlp(**SHAPE)
    model.register_buffer("steps", torch.zeros(1))
    outer = nn.parallel.DistributedDataParallel(model, process_group=group)
    opt = build("MeZO", outer, parallel=zo.Parallel("batch", group), perturb=perturb)
    for _ in range(6):
        opt.step(shared_batch(outer, group, opt.step_count))
    return weights_of(model)


def resumed_in_vain(group: Any, path: Any) -> str:
    opt = build("MeZO", block_mlp(**SHAPE), parallel=zo.Parallel("batch", group))
    try:
        opt.resume(path)
    except (OSError, TypeError) as error:
        return type(error).__name__
    return ""


def refused_arguments(group: Any) -> list[str]:
    """What is said of arguments that cannot be used by several ranks."""
    said = []
    model = block_mlp(**SHAPE)
    for make in (
        lambda: zo.MeZO(model, lr=0.1, directions=3, parallel=zo.Parallel("directions", group)),
        lambda: zo.MeZO(model, lr=0.1, directions=2, perturb="in_place", parallel=zo.Parallel("directions", group)),
        lambda: zo.MeZO(list(model.parameters()), lr=0.1, directions=2, parallel=zo.Parallel("directions", group)),
        lambda: zo.MeZO(model, lr=0.1, parallel=zo.Parallel("batch", group)).graphed(lambda: 0.0),
    ):
        try:
            make()
        except ValueError as error:
            said.append(str(error))
    return said
