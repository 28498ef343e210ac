"""`16-bits`: the same training in bf16 with each perturbation and rounding, and in fp32."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch

from ..bench.registry import Case, Row
from .arms import library
from .learning import Arm
from .run_rows import run_rows, shown
from .tasks import Studies

_TASK = "small-letters"  # of the two, that with the smaller learning rate: more of an update is below half an ulp
_WAYS = [(p, r) for p in ("in_place", "in_forward") for r in ("nearest", "stochastic")]


def cases(options: Namespace, studies: Studies) -> Iterator[Case]:
    arms = {"fp32": library("MeZO", options)}
    for perturb, rounding in _WAYS:
        name = f"bf16/{perturb}/{rounding}"
        arms[name] = library(name, options, dtype=torch.bfloat16, perturb=perturb, rounding=rounding)
    for name, arm in arms.items():
        facts = {"claim": "16-bits", "experiment": "learning", "task": _TASK, "dtype": name.partition("/")[0]}
        yield Case(f"16-bits/{name}", facts, partial(_learned, arms["fp32"], studies, arm))


def _learned(baseline: Arm, studies: Studies, arm: Arm) -> list[Row]:
    study = studies.of(_TASK)
    return run_rows(study.result(arm), study.result(baseline), study.seeds)


def cells(row: Row) -> dict[str, str]:
    return shown(row)
