"""`randomness`: statistics of noise v1, normals and signs, beside those of `torch.randn` and of Triton's `tl.randn`."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import torch

from ..bench.registry import Case, Row, Target, Wrong, judge
from . import battery
from .sources import SOURCES, Source

_SHOWN = {
    "population": ("statistic", "measured", "expected", "values_to_notice"),
    "moments": ("values", "statistic", "measured", "expected", "z", "p_value", "largest_possible"),
    "signs": ("statistic", "tests", "pairs", "measured", "expected", "z", "p_value"),
    "correlations": ("statistic", "tests", "pairs", "measured", "z", "at", "p_value"),
    "battery": ("values", "statistic", "tests", "first_p_value", "p_value", "assessment"),
}
_FORMS = {
    "values": ".3g", "pairs": ".3g", "measured": ".9g", "expected": ".9g", "z": "+.2f", "p_value": ".3g",
    "first_p_value": ".3g", "largest_possible": ".4f", "values_to_notice": ".2g",
}  # fmt: skip
_FAMILY = 0.001  # the chance that a perfect generator misses any bound of one case


def cases(options: Namespace) -> list[Case]:
    facts = {"experiment": "population", "generator": "zo.noise", "device": "cpu"}
    found = [Case("population/zo.noise", facts, partial(_population, options.threads))]
    for experiment in ("moments", "correlations"):
        for name in options.generators:
            source, what = SOURCES[name](), experiment
            if name == "zo.noise signs" and experiment == "moments":
                what = "signs"
            values = options.triton_values if name == "tl.randn" else options.values
            facts = {"experiment": what, "generator": name, "device": "cpu", "values": values}
            measure = partial(_sampled, what, source, values, options.threads)
            found.append(Case(f"{what}/{name}", facts, measure, source.skipped()))
    return [*found, *battery.cases(options)]


def _statistics(experiment: str, threads: int, *arguments: object) -> list[Row]:
    torch.set_num_threads(threads)
    return importlib.import_module(f".{experiment}", __package__).statistics(*arguments)  # where scipy is imported


def _population(threads: int) -> list[Row]:
    return [{"correct": True, **row} for row in _statistics("population", threads)]


def _sampled(experiment: str, source: Source, values: int, threads: int) -> list[Row]:
    if wrong := source.wrong():
        raise Wrong(wrong)
    rows = judged(_statistics(experiment, threads, source, values))
    return [{"correct": True if source.ours else None, **row} for row in rows]


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows of a case, each `p_value` held to Bonferroni's bound for all of them."""
    target = Target("p_value", at_least=_FAMILY / len(rows))
    return [{**row, **judge(row, [target])} for row in rows]


def cells(row: Row) -> dict[str, str]:
    texts = {
        column.replace("_", " "): "" if row.get(column) is None else format(row[column], _FORMS.get(column, ""))
        for column in _SHOWN[row["experiment"]]
    }
    return {**texts, "not by chance": f"missed {row['target']}" if row.get("target_met") is False else ""}
