"""`survival`: how much of a small update is left when the weights are rounded to 16 bits."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace

import torch
from torch import Tensor

import zo_kernels as zo
from zo_kernels.backends.types import Entry, Pass

from ..bench.registry import Row, Wrong
from ..kernels.cases import DTYPES
from ..kernels.check import wrong_pass
from .demo_task import largest_matrix

VARIANTS = [
    {"dtype": dtype, "rounding": rounding} for dtype in ("bf16", "fp16") for rounding in ("nearest", "stochastic")
]
_SIZES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
_PARAM_ID = 7
_MOST_ERRORS = 5.0


def measure(options: Namespace, dtype: str, rounding: str) -> list[Row]:
    torch.set_num_threads(options.threads)
    w = largest_matrix(options.model).to(DTYPES[dtype])
    rows = []
    for size in _SIZES:
        shares = [_share(w, seed, size, rounding) for seed in range(options.draws)]
        mean, error = statistics.mean(shares), statistics.stdev(shares) / math.sqrt(len(shares))
        if rounding == "stochastic" and not abs(mean - 1.0) <= _MOST_ERRORS * error:
            raise Wrong(f"of an update of {size:g} z {mean} ± {error} is left, not all of it")
        row = {"update": size, "draws": options.draws, "left": mean, "left_standard_error": error}
        rows.append({"elements": w.numel(), **row})
    return rows


def _share(w: Tensor, seed: int, size: float, rounding: str) -> float:
    """The projection of the change by one update on the update, in units of the update."""
    after = w.clone()

    def update() -> None:
        zo.add_noise_([after], seed, size, param_ids=[_PARAM_ID], rounding=rounding)

    if seed > 0:
        update()
    elif wrong := wrong_pass(
        [Entry(after, after, _PARAM_ID)], Pass([seed], [[size]], [1.0], rounding == "stochastic"), update
    ):
        raise Wrong(wrong)
    z = zo.noise(w.shape, seed=seed, param_id=_PARAM_ID).double()
    return ((after.double() - w.double()) * z).sum().item() / (size * z.square().sum().item())


def cells(row: Row) -> dict[str, str]:
    return {
        "update": f"{row['update']:g} z",
        "left of it": f"{row['left']:.4f} ± {row['left_standard_error']:.4f}",
    }
