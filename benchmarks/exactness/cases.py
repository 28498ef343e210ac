"""`exactness`: what perturbing and rounding cost in exactness, and what trajectories cost in time and bytes."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from dataclasses import replace

from ..bench.registry import Case, Row
from . import drift, four, replayed, shared_z, survival

_EXPERIMENTS = {
    "drift": drift,
    "survival": survival,
    "four": four,
    "replay": replayed,
    "shared-z": shared_z,
}


def cases(options: Namespace) -> list[Case]:
    found = [case for experiment in _EXPERIMENTS.values() for case in experiment.cases(options)]
    if importlib.util.find_spec("transformers") is None:
        return [replace(case, skipped="transformers is not installed") for case in found]
    return found


def cells(row: Row) -> dict[str, str]:
    return _EXPERIMENTS[row["experiment"]].cells(row)
