"""`drift`: where perturbation alone takes a weight. Steps with lr = 0 should leave it where it was."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn

import zo_kernels as zo

from ..bench.registry import Row, Wrong
from ..kernels.cases import DTYPES
from ..kernels.check import differing
from ..step.exact import wrong_step
from .demo_task import largest_matrix

VARIANTS = [
    {"dtype": dtype, "perturb": perturb, "rounding": rounding}
    for dtype in DTYPES
    for perturb in ("in_place", "in_forward")
    for rounding in ("nearest", "stochastic")
    if (dtype, rounding) != ("fp32", "stochastic")  # fp32 needs no rounding
]
_REPORTED = (1, 100, 1_000, 10_000)


class Held(nn.Module):
    """A weight, and a forward that costs nothing."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return torch.ones(())


def measure(options: Namespace, dtype: str, perturb: str, rounding: str) -> list[Row]:
    torch.set_num_threads(options.threads)
    start = largest_matrix(options.model).to(DTYPES[dtype]) + 0.0  # an update by 0 turns -0, which fp16 has, into 0
    model = Held(start.clone())
    optimizer = zo.MeZO(model, lr=0.0, eps=1e-3, perturb=perturb, rounding=rounding)
    if wrong := wrong_step(optimizer, model, model):
        raise Wrong(wrong)
    rows = []
    for step in sorted({s for s in _REPORTED if s < options.steps} | {options.steps}):
        while optimizer.step_count < step:
            optimizer.step(model)
        rows.append({"elements": start.numel(), "steps": step, **_distance(model.weight, start)})
    if perturb == "in_forward" and (changed := rows[-1]["share_changed"]):
        raise Wrong(f"{changed:.2%} of the weights have other bits")
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
