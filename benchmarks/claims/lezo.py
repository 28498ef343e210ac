"""`lezo`: whether leaving out blocks (LeZO, arXiv 2410.09823) trains faster than MeZO, by steps and by time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import zo_kernels as zo

from ..bench.registry import Case, Row
from ..step.methods import Method
from . import step_times
from .arms import library
from .equal_time import by_time
from .run_rows import interval, run_rows, shown
from .step_times import StepTimes
from .tasks import LANGUAGE, Studies

_DROPS = (0.25, 0.5, 0.75)


def cases(options: Namespace, studies: Studies, times: StepTimes) -> Iterator[Case]:
    for setting in step_times.settings(options):
        for drop in _DROPS:
            facts = {"claim": "lezo", "drop": drop}
            yield step_times.case(options, times, f"/drop-{drop:g}", facts, Method(zo.LeZO, drop=drop), setting)
    for task, kind in studies.kinds.items():
        for drop in (0.0, *(_DROPS if task in LANGUAGE else _DROPS[1:])):
            facts = {"claim": "lezo", "experiment": "learning", "task": task, "drop": drop, "dtype": "float32"}
            measure = partial(_learned, options, studies, times, task, drop)
            yield Case(f"lezo/{task}/drop-{drop:g}", facts, measure, kind.skipped)


def _learned(options: Namespace, studies: Studies, times: StepTimes, task: str, drop: float) -> list[Row]:
    study = studies.of(task)
    dense = study.result(library("MeZO", options))
    result = study.result(library(f"LeZO {drop:g}", options, drop=drop)) if drop else dense
    rows = run_rows(result, dense, study.seeds)
    if drop:
        rows[-1] |= by_time(result.curves, dense.curves, times.shares(Method(zo.LeZO, drop=drop)))
    return rows


def cells(row: Row) -> dict[str, str]:
    if row["experiment"] == "step":
        return step_times.cells(row)
    texts = shown(row)
    for whose in ("published", "ours"):
        texts[f"time to equal loss, {whose}"] = interval(row, f"{whose}_time_to_loss_ratio", ".2f")
    return texts
