"""`exactness`: what perturbing and rounding cost in exactness, and what trajectories cost in time and bytes."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from functools import partial
from typing import Any, Protocol

from ..bench.registry import Case, Row
from ..step.cases import NO_TRANSFORMERS
from . import drift, four, replayed, shared_z, survival


class Experiment(Protocol):
    """A module that measures one thing on several variants."""

    VARIANTS: list[dict[str, str]]  # a case each: its columns, whose values also name it

    def measure(self, options: Namespace, **variant: str) -> list[Row]:
        """Check, measure and return rows; raise Wrong if a check fails."""

    def cells(self, row: Row) -> dict[str, str]: ...


_EXPERIMENTS: dict[str, Any] = {
    "drift": drift,
    "survival": survival,
    "four": four,
    "replay": replayed,
    "shared-z": shared_z,
}


def cases(options: Namespace) -> list[Case]:
    skipped = None if importlib.util.find_spec("transformers") else NO_TRANSFORMERS
    return [
        Case(
            "/".join((name, *variant.values())),
            {"experiment": name, "device": "cpu", **variant, "threads": options.threads},
            partial(_measured, experiment, options, variant),
            skipped,
        )
        for name, experiment in _EXPERIMENTS.items()
        for variant in experiment.VARIANTS
    ]


def _measured(experiment: Experiment, options: Namespace, variant: dict[str, str]) -> list[Row]:
    return [{"correct": True, **row} for row in experiment.measure(options, **variant)]


def cells(row: Row) -> dict[str, str]:
    return _EXPERIMENTS[row["experiment"]].cells(row)
