"""`lezo`: whether leaving out blocks (LeZO, arXiv 2410.09823) trains faster than MeZO, by steps and by time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import zo_kernels as zo

from ..registry import Case, Row
from ..step_methods import Method
from . import step_times
from .arms import library
from .interval import ratio
from .learning import Result
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
        method = Method(zo.LeZO, drop=drop)
        seconds = times.seconds(method, *step_times.settings(options)[0])
        studies.of(task)  # timing changed the number of threads
        for whose in ("ours", "published"):
            rows[-1] |= _by_time(result, dense, seconds[whose] / seconds[f"{whose} MeZO"], whose)
    return rows


def _by_time(result: Result, dense: Result, share: float, whose: str) -> Row:
    """With steps that take `share` of the time of MeZO's.

    Returns:
        the share, and by how much longer MeZO takes to reach the higher of the two losses that a seed's runs end with,
        with the verdict of the claim that it takes longer.
    """
    needed, of_mezo = [], []
    for ours, mezo in zip(result.curves, dense.curves, strict=True):
        loss = max(ours.losses[-1], mezo.losses[-1])
        mine, its = ours.reaches(loss), mezo.reaches(loss)
        needed.append(float("inf") if mine is None else mine * share)
        of_mezo.append(float("inf") if its is None else its)
    row = ratio(needed, of_mezo, f"{whose}_time_to_loss")
    return {f"{whose}_step_time_ratio": share, **row}


def cells(row: Row) -> dict[str, str]:
    if row["experiment"] == "step":
        return step_times.cells(row)
    texts = shown(row)
    for whose in ("ours", "published"):
        texts[f"time to equal loss, {whose}"] = interval(row, f"{whose}_time_to_loss_ratio", ".2f")
    return texts
