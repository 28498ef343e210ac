"""`survival`: how much of a small update is left when the weights are rounded to 16 bits."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import zo_kernels as zo

from ..bench.registry import Case, Row
from ..kernels.reference_pass import differing, moved
from .demo_task import DTYPES, largest_matrix

_SIZES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
_PARAM_ID = 7
_WINDOW = 4096
_MOST_ERRORS = 5.0


def cases(options: Namespace) -> Iterator[Case]:
    for dtype in ("bf16", "fp16"):
        for rounding in ("nearest", "stochastic"):
            facts = {
                "experiment": "survival",
                "device": "cpu",
                "dtype": dtype,
                "rounding": rounding,
                "threads": options.threads,
            }
            yield Case(f"survival/{dtype}/{rounding}", facts, partial(_measure, options, dtype, rounding))


def _measure(options: Namespace, dtype: str, rounding: str) -> list[Row]:
    torch.set_num_threads(options.threads)
    w = largest_matrix(options.model).to(DTYPES[dtype])
    rows = []
    for size in _SIZES:
        shares = []
        for seed in range(options.draws):
            after = w.clone()
            zo.add_noise_([after], seed, size, param_ids=[_PARAM_ID], rounding=rounding)
            if seed == 0 and (wrong := _wrong(w, after, size, rounding)):
                return [{"correct": False, "wrong": wrong}]
            shares.append(_share(w, after, seed, size))
        mean, error = statistics.mean(shares), statistics.stdev(shares) / math.sqrt(len(shares))
        if rounding == "stochastic" and not abs(mean - 1.0) <= _MOST_ERRORS * error:
            return [{"correct": False, "wrong": f"of an update of {size:g} z {mean} ± {error} is left, not all of it"}]
        row = {"update": size, "draws": options.draws, "left": mean, "left_standard_error": error}
        rows.append({"correct": True, "elements": w.numel(), **row})
    return rows


def _wrong(w: Tensor, after: Tensor, size: float, rounding: str) -> str | None:
    """What the reference says of the first elements."""
    got = after.view(-1)[:_WINDOW]
    off = differing(got, moved(w.view(-1)[:_WINDOW], 0, size, _PARAM_ID, rounding=rounding))
    return f"{off} of {len(got)} elements are not the reference's" if off else None


def _share(w: Tensor, after: Tensor, seed: int, size: float) -> float:
    """The projection of the change on the update, in units of the update."""
    z = zo.noise(w.shape, seed=seed, param_id=_PARAM_ID).double()
    return ((after.double() - w.double()) * z).sum().item() / (size * z.square().sum().item())


def cells(row: Row) -> dict[str, str]:
    return {
        "update": f"{row['update']:g} z",
        "left of it": f"{row['left']:.4f} ± {row['left_standard_error']:.4f}",
    }
