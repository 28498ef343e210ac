"""`drift`: where perturbation alone takes a weight. Steps with lr = 0 should leave it where it was."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import zo_kernels as zo

from ..bench.registry import Case, Row
from ..kernels.reference_pass import differing
from ..step.exact import wrong_step
from .demo_task import DTYPES, largest_matrix

_EPS = 1e-3
_REPORTED = (1, 100, 1_000, 10_000)


class Held(nn.Module):
    """A weight, and a forward that costs nothing."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return torch.ones(())


def cases(options: Namespace) -> Iterator[Case]:
    for dtype in DTYPES:
        for perturb in ("in_place", "in_forward"):
            for rounding in ("nearest", "stochastic"):
                if (dtype, rounding) == ("fp32", "stochastic"):
                    continue  # fp32 needs no rounding
                facts = {
                    "experiment": "drift",
                    "device": "cpu",
                    "dtype": dtype,
                    "perturb": perturb,
                    "rounding": rounding,
                    "threads": options.threads,
                }
                measure = partial(_measure, options, dtype, perturb, rounding)
                yield Case("/".join(("drift", dtype, perturb, rounding)), facts, measure)


def _measure(options: Namespace, dtype: str, perturb: str, rounding: str) -> list[Row]:
    torch.set_num_threads(options.threads)
    start = (
        largest_matrix(options.model).to(DTYPES[dtype]) + 0.0
    )  # of a -0, which fp16 has here, an update by 0 makes 0
    model = Held(start.clone())
    optimizer = zo.MeZO(model, lr=0.0, eps=_EPS, perturb=perturb, rounding=rounding)
    if wrong := wrong_step(optimizer, model, model):
        return [{"correct": False, "wrong": wrong}]
    rows = []
    for step in sorted({s for s in _REPORTED if s < options.steps} | {options.steps}):
        while optimizer.step_count < step:
            optimizer.step(model)
        rows.append({"correct": True, "elements": start.numel(), "steps": step, **_distance(model.weight, start)})
    if perturb == "in_forward" and rows[-1]["share_changed"]:
        return [{"correct": False, "wrong": f"{rows[-1]['share_changed']:.2%} of the weights have other bits"}]
    return rows


def _distance(now: Tensor, start: Tensor) -> Row:
    changed = differing(now, start)
    off, start = now.detach().double() - start.double(), start.double()
    return {
        "share_changed": changed / start.numel(),
        "relative_rms": (off.square().mean().sqrt() / start.square().mean().sqrt()).item(),
        "largest": off.abs().max().item(),
        "rms_of_weights": start.square().mean().sqrt().item(),
    }


def cells(row: Row) -> dict[str, str]:
    return {
        "steps": f"{row['steps']:,}",
        "other bits": f"{row['share_changed']:.2%}",
        "RMS off / RMS": f"{row['relative_rms']:.2e}",
        "largest": f"{row['largest']:.2e}",
    }
