"""`claims`: what the methods' papers claim, measured again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..bench.registry import Case, Row
from ..bench.rows import COLUMNS as TIMED
from . import dominates, lezo, sixteen, sparse
from .learning import WrongStep
from .step_times import StepTimes
from .svrg import least_squares, mlp, variance
from .tasks import Studies

_SHOWN = {
    "perturbation-dominates": dominates.cells,
    "lezo": lezo.cells,
    "sparse-mezo": sparse.cells,
    "16-bits": sixteen.cells,
    "svrg-variance": variance.cells,
    "svrg-least-squares": least_squares.cells,
    "svrg-mlp": mlp.cells,
}
COLUMNS = ("case", "claim", "experiment", *(c for c in TIMED if c != "case"))


def cases(options: Namespace) -> list[Case]:
    studies, times = Studies(options), StepTimes(options)
    found: list[Iterable[Case]] = [
        dominates.cases(options, times),
        lezo.cases(options, studies, times),
        sparse.cases(options, studies, times),
        sixteen.cases(options, studies),
        variance.cases(options),
        least_squares.cases(options),
        mlp.cases(options),
    ]
    every = [replace(case, measure=_checked(case.measure)) for each in found for case in each]
    # What is timed goes first: the rest takes long, and does not mind what else the machine does.
    return sorted(every, key=lambda case: case.facts.get("experiment") != "step")


def _checked(measure: Callable[[], list[Row]]) -> Callable[[], list[Row]]:
    def rows() -> list[Row]:
        try:
            return measure()
        except WrongStep as error:
            return [{"correct": False, "wrong": str(error)}]

    return rows


def cells(row: Row) -> dict[str, str]:
    return _SHOWN[row["claim"]](row)
