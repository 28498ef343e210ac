"""`randomness`: statistics of noise v1 beside those of `torch.randn` and of Triton's `tl.randn`."""

from __future__ import annotations

from argparse import Namespace

from ..bench.registry import Case, Row
from . import battery, correlations, moments, population

_EXPERIMENTS = {"population": population, "moments": moments, "correlations": correlations, "battery": battery}

COLUMNS = (
    "case", "experiment", "generator", "device", "stream", "values", "statistic", "tests", "pairs", "at",
    "measured", "expected", "standard_error", "z", "p_value",
    "largest_possible", "values_to_notice", "first_p_value", "assessment",
    "correct", "wrong", "skipped", "target", "target_met", "target_missed",
    "device_name", "torch_version", "zo_kernels_version", "commit", "date_utc",
)  # fmt: skip


def cases(options: Namespace) -> list[Case]:
    return [case for experiment in _EXPERIMENTS.values() for case in experiment.cases(options)]


def cells(row: Row) -> dict[str, str]:
    return _EXPERIMENTS[row["experiment"]].cells(row)
