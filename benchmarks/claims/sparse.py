"""`sparse-mezo`: whether training small weights alone (arXiv 2402.15751) is better than all, large or random ones."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import zo_kernels as zo

from ..bench.registry import Case, Row
from ..step.methods import Method
from . import step_times
from .arms import library, masked
from .equal_time import by_time
from .learning import Arm
from .run_rows import run_rows, shown
from .step_times import StepTimes
from .tasks import LANGUAGE, Studies

_SPARSITIES = (0.5, 0.65, 0.75, 0.8)
_ABLATED = 0.75


def _arms(options: Namespace, task: str) -> dict[str, Arm]:
    """All of them on one task, the ablation on the other language model, Sparse-MeZO itself where steps take long."""
    sparsities = _SPARSITIES if task == "capitals" else (_ABLATED,)
    arms = {"all": library("MeZO", options)}
    arms |= {f"small-{s:g}": library(f"SparseMeZO {s:g}", options, sparsity=s) for s in sparsities}
    if task not in LANGUAGE:
        return arms
    for kind, redrawn in (("large", True), ("random", False), ("small", False)):
        name = f"{kind}-{_ABLATED:g}" + ("" if kind != "small" else "-mask-kept")
        arms[name] = masked(name, options, sparsity=_ABLATED, kind=kind, redrawn=redrawn)
    return arms


def cases(options: Namespace, studies: Studies, times: StepTimes) -> Iterator[Case]:
    for setting in step_times.settings(options):
        facts = {"claim": "sparse-mezo", "sparsity": _ABLATED}
        yield step_times.case(options, times, "", facts, Method(zo.SparseMeZO, sparsity=_ABLATED), setting)
    for task, kind in studies.kinds.items():
        for name, arm in _arms(options, task).items():
            facts = {"claim": "sparse-mezo", "experiment": "learning", "task": task, "dtype": "float32"}
            measure = partial(_learned, options, studies, times, task, arm)
            yield Case(f"sparse-mezo/{task}/{name}", facts, measure, kind.skipped)


def _learned(options: Namespace, studies: Studies, times: StepTimes, task: str, arm: Arm) -> list[Row]:
    study = studies.of(task)
    dense, result = study.result(library("MeZO", options)), study.result(arm)
    rows = run_rows(result, dense, study.seeds)
    if arm.name.startswith("SparseMeZO"):  # steps of the ablations are not the library's
        # A pass looks at every weight, so that its time is that of any sparsity.
        shares = times.shares(Method(zo.SparseMeZO, sparsity=_ABLATED))
        rows[-1] |= by_time(result.curves, dense.curves, shares)
    return rows


def cells(row: Row) -> dict[str, str]:
    if row["experiment"] == "step":
        return step_times.cells(row)
    highest = row["highest_useful_lr"]
    return shown(row) | {"highest useful lr": "" if highest is None else f"{highest:.2e}"}
