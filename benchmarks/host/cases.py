"""`host`: host time of a step beside its forwards, on a model so narrow that it counts.

A GPU waits for the host if a launch takes the host longer than the kernel takes the GPU. On a CPU the GPU backends are
stand-ins that launch nothing (`stand_ins.py`); on a GPU their launches are real, and nobody waits for them.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import zo_kernels as zo
from zo_kernels import ops
from zo_kernels.backends.types import Pass
from zo_kernels.perturbation.reads.watch_policy import is_sampled

from ..bench.compare import Trial, Versus, compare
from ..bench.registry import Case, Row
from ..bench.timing import Call, Plan
from ..step.cases import NO_TRANSFORMERS, unusable
from ..step.exact import wrong_step
from ..step.methods import EPS, LR
from ..step.shapes import Batch, opt_model
from .stand_ins import Launches, standing_in

# With OPT's vocabulary the embedding is larger than a block, so a block is perturbed at once; with a small one each
# module is perturbed by itself.
VOCABULARIES = {"together": 50272, "one by one": 64}
_WIDTH, _TOKENS = 16, 8
_WATCHED = 17  # steps, after which the optimizer knows what runs
_MICRO = 1e6


def cases(options: Namespace) -> list[Case]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = device.type == "cpu"
    return [
        _case(options, device, backend, where, size)
        for backend in (("nothing", "triton", "cuda", "native") if on_cpu else ("triton", "cuda"))
        for where in ("in_forward", "in_place")
        for size in (VOCABULARIES if where == "in_forward" else ("together",))
    ]


def _case(options: Namespace, device: torch.device, backend: str, where: str, size: str) -> Case:
    stands_in = backend == "nothing" or (device.type == "cpu" and backend != "native")
    reason = NO_TRANSFORMERS if importlib.util.find_spec("transformers") is None else None
    if not stands_in:
        reason = unusable(device, backend)
    elif backend == "triton":
        reason = reason or _no_compiler()
    facts = {
        "device": str(device),
        "dtype": "bfloat16",
        "threads": 1,
        "backend": backend,
        "launches": "none" if stands_in else "real",
        "perturb": where,
        "layers": options.layers,
        "width": _WIDTH,
        "vocabulary": VOCABULARIES[size],
    }
    name = f"{backend}/{where}" + (f"/{size}" if where == "in_forward" else "")
    return Case(name, facts, partial(_measure, options, device, backend, where, size, stands_in), reason, str(device))


def _no_compiler() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available():  # kernels compiled for the stand-in would stay in Triton's cache
        return "there is a GPU: --device cuda launches on it"
    from zo_kernels.backends.triton.launch import target

    return "this process runs Triton's interpreter" if target() == "interpreter" else None


def _measure(
    options: Namespace, device: torch.device, backend: str, where: str, size: str, stands_in: bool
) -> list[Row]:
    torch.set_num_threads(1)
    build = opt_model(_WIDTH, 4 * _WIDTH, options.layers, heads=2, vocabulary=VOCABULARIES[size], positions=64)
    task = build(Batch(1, _TOKENS), device, torch.bfloat16)
    model, loss = task.model, partial(task.loss, task.model)
    around: AbstractContextManager[Any] = standing_in(backend) if stands_in else nullcontext()
    with around as launched:
        optimizer = zo.MeZO(model, lr=LR, eps=EPS, perturb=where, backend=None if backend == "nothing" else backend)
        _settle(optimizer, loss, stands_in)
        check = partial(_wrong_launches, optimizer, model, loss, launched)
        if not stands_in:
            check = partial(wrong_step, optimizer, model, loss)
        versus = Versus("two forwards", Call(partial(_two, loss)))
        trial = Trial(Call(lambda: optimizer.step(loss)), check, [versus], sum(p.numel() for p in model.parameters()))
        # The host is timed, also if there is a GPU.
        rows = compare(trial, Plan(options.rounds, options.seconds), torch.device("cpu"))
        return [row | _told(row, optimizer, model, loss) for row in rows]


@torch.no_grad()
def _two(loss: Callable[[], Tensor]) -> None:
    for _ in range(2):
        loss()


def _settle(opt: zo.ZeroOrderOptimizer, loss: Callable[[], Tensor], stands_in: bool) -> None:
    """Take the steps in which the optimizer learns what runs.

    A stand-in does not fill the perturbed copies, so they begin as zeros: later losses are then finite.
    """

    def closure() -> Tensor | float:
        value = loss()
        return 1.0 if stands_in else value

    while opt.step_count <= _WATCHED:
        with mock.patch.object(torch, "empty", torch.zeros) if stands_in else nullcontext():
            opt.step(closure)


def _passes_of(opt: zo.ZeroOrderOptimizer, loss: Callable[[], Tensor]) -> list[list[int]]:
    """The parameter ids of each pass of one step."""
    seen: list[list[int]] = []
    apply = ops.Table.apply

    def noted(table: ops.Table, do: Pass, *then: Any) -> None:
        seen.append([e.param_id for e in table.entries])
        apply(table, do, *then)

    with mock.patch.object(ops.Table, "apply", noted):
        opt.step(loss)
    return seen


def _wrong_launches(
    opt: zo.ZeroOrderOptimizer, model: nn.Module, loss: Callable[[], Tensor], launched: Launches
) -> str | None:
    """Every pass must launch; each weight is in one pass of an evaluation (a tied one in two) and of the update."""
    before = [p.detach().clone() for p in model.parameters()]
    launched.clear()
    passes = _passes_of(opt, loss)
    if len(launched) < len(passes):
        return f"{len(passes)} passes made {len(launched)} launches"
    times = Counter(i for ids in passes for i in ids)
    if len(times) != len(before) or not set(times.values()) <= {3, 5}:
        return f"expected {len(before)} weights in three or five passes, got {len(times)} in {set(times.values())}"
    if not all(map(torch.equal, model.parameters(), before)):
        return "weights changed without a launch"
    return None


def _told(row: Row, opt: zo.ZeroOrderOptimizer, model: nn.Module, loss: Callable[[], Tensor]) -> Row:
    owners = sum(any(True for _ in m.parameters(recurse=False)) for m in model.modules())
    while is_sampled(opt.seed, opt.step_count):  # a sampled step takes each module by itself
        opt.step(loss)
    passes = len(_passes_of(opt, loss))
    ours = _MICRO * (row["cpu_seconds_median"] - row["baseline_cpu_seconds_median"])
    return {
        "modules": owners,
        "weights": sum(1 for _ in model.parameters()),
        "passes_per_step": passes,
        "forwards_us": _MICRO * row["baseline_cpu_seconds_median"],
        "step_us": _MICRO * row["cpu_seconds_median"],
        "ours_us_per_step": ours,
        "ours_us_per_module": ours / (2 * owners),  # of each of the two forwards
    }


def notes() -> list[str]:
    return ["*together* and *one by one* differ in the vocabulary, so their forwards are not the same."]


def cells(row: Row) -> dict[str, str]:
    return {
        "launches": row["launches"],
        "passes": str(row["passes_per_step"]),
        "two forwards µs": f"{row['forwards_us']:,.0f}",
        "step µs": f"{row['step_us']:,.0f}",
        "ours µs": f"{row['ours_us_per_step']:,.0f}",
        "µs a module and forward": f"{row['ours_us_per_module']:.1f}",
    }
