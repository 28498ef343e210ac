"""`offload`: steps of weights that stay on a CPU and are copied to where their module runs, against steps of weights
that are there already. Where there is no GPU, both are on the CPU: what the copying itself takes.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from functools import partial

import torch
from torch import nn

import zo_kernels as zo
from zo_kernels.perturbation.streamed import StreamedEngine, bytes_on_device

from ..bench.compare import Trial, Versus, compare
from ..bench.registry import Case, Row
from ..bench.timing import Call, Plan
from ..kernels.cases import DTYPES
from ..kernels.check import differing
from ..step.cases import unusable
from ..step.exact import wrong_step
from ..step.methods import EPS, LR
from ..step.shapes import SHAPES, Batch, Shape, device_of

_GB = 1e9


def cases(options: Namespace) -> list[Case]:
    device = device_of(options)
    shapes = options.shape or (["opt-1.3b", "opt-13b"] if device.type == "cuda" else ["minilm"])
    return [_case(name, device, options) for name in dict.fromkeys(shapes)]


def _case(name: str, device: torch.device, options: Namespace) -> Case:
    shape = SHAPES[name]
    batch = shape.batch_of(options, device)
    facts = {"device": str(device), "dtype": options.dtype, "threads": options.threads, "shape": name}
    facts |= {"batch": batch.examples, "tokens": batch.tokens}
    return Case(
        name,
        facts,
        partial(_measure, shape, batch, device, options),
        unusable(device, None),
        str(device),
        lambda: 3 * DTYPES[options.dtype].itemsize * sum(p.numel() for p in shape.parameters()),
    )


def _measure(shape: Shape, batch: Batch, device: torch.device, options: Namespace) -> list[Row]:
    torch.set_num_threads(options.threads)
    task = shape.build(batch, device, DTYPES[options.dtype])
    resident, away = task.model, copy.deepcopy(task.model).to("cpu")
    there = zo.MeZO(resident, lr=LR, eps=EPS, perturb="in_forward")
    streamed = zo.MeZO(away, lr=LR, eps=EPS, execution_device=device)
    engine = streamed._perturbation.place.engine
    assert isinstance(engine, StreamedEngine)

    def step(optimizer: zo.ZeroOrderOptimizer, model: nn.Module) -> object:
        return optimizer.step(lambda: task.loss(model))

    def check() -> str | None:
        """Take one step with each: the first is held to the specification's bits, the other to those of the first."""
        if wrong := wrong_step(there, resident, lambda: task.loss(resident)):
            return wrong
        step(streamed, away)
        for (name, p), q in zip(away.named_parameters(), resident.parameters(), strict=True):
            if off := differing(p, q.to("cpu")):
                return f"{off} weights of {name} have other bits than where they were there already"
        return None

    ours, baseline = (Call(partial(step, o, m), options.threads) for o, m in ((streamed, away), (there, resident)))
    peaks: Row = {}
    if device.type == "cuda":
        peaks = {"peak_gb": _peak(ours, device), "baseline_peak_beside_weights_gb": _peak(baseline, device)}
    trial = Trial(ours, check, [Versus("weights on the device", baseline)], sum(p.numel() for p in away.parameters()))
    rows = compare(trial, Plan(options.rounds, options.seconds), device)
    before = engine.bytes_copied
    step(streamed, away)
    more = {
        "weights_gb": sum(p.nbytes for p in away.parameters()) / _GB,
        "copied_gb_per_step": (engine.bytes_copied - before) / _GB,
        "weights_on_device_gb": engine.bytes_on_device / _GB,
        "weights_on_device_told_gb": bytes_on_device(away) / _GB,
        **peaks,
    }
    return [row | more for row in rows]


def _peak(call: Call, device: torch.device) -> float:
    """Peak memory of a call on a GPU in GB, less what was allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call.run()
    return (torch.cuda.max_memory_allocated(device) - before) / _GB


def cells(row: Row) -> dict[str, str]:
    return {
        "ms/step": f"{row['seconds_median'] * 1e3:,.1f}",
        "weights GB": f"{row['weights_gb']:.3f}",
        "on device": f"{row['weights_on_device_gb']:.3f}",
        "copied/step": f"{row['copied_gb_per_step']:.3f}",
        **({"peak GB": f"{row['peak_gb']:.3f}"} if "peak_gb" in row else {}),
    }
